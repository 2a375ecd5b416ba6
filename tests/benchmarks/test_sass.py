"""benchmarks/sass.py reads machine code right: a fixed text, whose paths are counted by hand."""

from __future__ import annotations

import sys

import pytest

from tests.support.paths import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import machine_code  # noqa: E402
import sass  # noqa: E402

USAGE = """
Fatbin elf code:
================
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0 CONSTANT[3]:8
 Function _ZN10doublehead3nms4markEv:
  REG:38 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

OUTER, INNER = 2 * machine_code.mark_number("outer"), 2 * machine_code.mark_number("inner")
CODE = f"""
	code for sm_90
		Function : _ZN10doublehead3nms4walkIfEEvPKf
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/                   PMTRIG {OUTER:#x} ;                   /* 0x0000132400007801 */
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR6][R2.64] ;
        /*0030*/              @!P0 BRA 0x60 ;
        /*0040*/                   FADD R8, R8, R9 ;
        /*0050*/                   CALL.REL.NOINC 0x120 ;
        /*0060*/                   PMTRIG {INNER:#x} ;
        /*0070*/                   LDS.U8 R10, [R4] ;
        /*0080*/                   FFMA R8, R8, R10, R8 ;
        /*0090*/               @P1 BRA 0x70 ;
        /*00a0*/                   PMTRIG {INNER + 1:#x} ;
        /*00b0*/               @P2 BRA 0x20 ;
        /*00c0*/              @!P3 EXIT ;
        /*00d0*/               @P4 BRA 0x110 ;
        /*00e0*/                   PMTRIG {OUTER + 1:#x} ;
        /*00f0*/                   STG.E.64 desc[UR6][R2.64], R8 ;
        /*0100*/                   EXIT ;
        /*0110*/                   EXIT ;
        /*0120*/                   MUFU.RCP R9, R8 ;
        /*0130*/                   RET.REL.NODEC R6 0x0 ;
        /*0140*/                   BRA 0x140;
        /*0150*/                   NOP;
"""


@pytest.fixture
def code() -> machine_code.Code:
    (found,) = machine_code.read_code(CODE)
    return found


def test_resources_are_read_right():
    assert machine_code.read_usage(USAGE) == [machine_code.Usage("sm_90", "_ZN10doublehead3nms4markEv", 38, 8, 0, 1024)]


def test_instructions_are_read_right_and_padding_left_out(code):
    assert (code.arch, code.name) == ("sm_90", "_ZN10doublehead3nms4walkIfEEvPKf")
    assert len(code.instructions) == 0x140 // 16
    assert code.instructions[3] == machine_code.Instruction(0x30, "!P0", "BRA", "0x60")
    assert machine_code.count_opcodes(code.instructions)["LDG.128"] == 1
    assert machine_code.count_opcodes(code.instructions)["LDS.8"] == 1
    assert machine_code.count_opcodes(code.instructions)["STG.64"] == 1


def test_sections_have_the_instructions_on_every_way_between_their_marks(code):
    outer, inner = machine_code.sections(code, ["outer", "inner"])
    assert inner == machine_code.Section("inner", 3, 3, 3, {"LDS.8": 1, "FFMA": 1, "BRA": 1})
    # LDG, BRA, FADD, CALL, the inner three, three branches: the shorter way has no FADD and CALL. A loop counts once;
    # where a way leaves the kernel (0x110), it is not between; nor is what is called.
    assert (outer.longest, outer.shortest, outer.all) == (10, 8, 10)
    assert outer.opcodes == {"LDG.128": 1, "BRA": 4, "FADD": 1, "CALL": 1, "LDS.8": 1, "FFMA": 1, "EXIT": 1}


def test_a_section_without_its_end_is_empty_and_a_name_that_is_not_there_has_none(code):
    endless = code._replace(instructions=code.instructions[:5])
    assert [(s.mark, s.longest, s.all) for s in machine_code.sections(endless, ["outer", "nowhere"])] == [
        ("outer", 0, 0)
    ]


def test_a_jump_by_a_table_reaches_the_code_that_nothing_else_does():
    text = f"""
		Function : switch
        /*0000*/                   PMTRIG {INNER:#x} ;
        /*0010*/                   BRX R16 -0x20 ;
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/                   BRA 0x60 ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/                   FMUL R1, R1, R2 ;
        /*0060*/                   PMTRIG {INNER + 1:#x} ;
        /*0070*/                   EXIT ;
"""
    (section,) = machine_code.sections(machine_code.read_code(text)[0], ["inner"])
    assert (section.shortest, section.longest, section.all) == (3, 3, 5)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "dynamic", "blocks"),
    [
        ("sm_90", 72, 1024, 224, 900, 4),  # registers: 28 warps of 72 * 32 fit
        ("sm_90", 80, 1024, 224, 0, 3),
        ("sm_80", 32, 0, 1024, 0, 2),  # threads
        ("sm_80", 16, 0, 32, 0, 32),  # blocks
        ("sm_80", 16, 40 << 10, 256, 0, 4),  # shared memory: 41 KiB with the system's part
        ("sm_90", 16, 1024, 256, 99 << 10, 2),  # 100 KiB each of 228
        ("sm_100", 16, 0, 256, 227 << 10, 1),
    ],
)
def test_blocks_that_fit_on_a_multiprocessor(arch, registers, shared, threads, dynamic, blocks):
    assert (
        sass.blocks_per_multiprocessor(machine_code.Usage(arch, "k", registers, 0, 0, shared), threads, dynamic)
        == blocks
    )


def test_names_of_marks_in_the_sources_have_a_number_each():
    names = machine_code.marks_in()
    assert len({machine_code.mark_number(name) for name in names}) == len(names)
    assert machine_code.mark_number("inner one") == 0xEDA4 // 2  # as the compiler computes it


def test_every_mark_in_the_sources_is_ended(tmp_path):
    (tmp_path / "kernel.cuh").write_text('  DOUBLEHEAD_MARK_BEGIN("fill");\n//   DOUBLEHEAD_MARK_BEGIN("words");\n')
    assert machine_code.marks_in(tmp_path) == ["fill"]
    texts = [path.read_text() for path in (BENCHMARKS.parent / "csrc").rglob("*.cuh")]
    for name in machine_code.marks_in():
        assert any(f'DOUBLEHEAD_MARK_END("{name}")' in text for text in texts), name


def test_names_are_shown_without_their_parameters():
    name = "_ZN10doublehead9roi_align6device11pool_planarIffEEvNS1_7ProblemIT0_EENS1_4RoomE"
    assert sass.plain_name(name) in ("pool_planar<float, float>", name)  # without c++filt as it is
