"""The training loop, its optimiser, and the guard against losses that are not finite."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from doublehead.config import TrainConfig
from doublehead.engine.distributed import World
from doublehead.engine.errors import NonFiniteLossError, UserError
from doublehead.engine.optim import WeightAverage, build_optimizer, learning_rate, seed_step
from doublehead.engine.tracker import LossTracker
from doublehead.engine.trainer import Hooks, Trainer, _parallel, check_config, micro_batch_size
from tests.support.engine_standin import TinyDetector, one_thread  # noqa: F401 (a fixture)
from tests.support.training_cases import CONFIG, batches


def new_trainer(config=CONFIG, model=None, hooks=None, size=4):
    torch.manual_seed(1)
    model = model or TinyDetector(3)
    return Trainer(model, config, lambda start: batches(start, size), hooks=hooks)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class Recorder(Hooks):
    def __init__(self):
        self.records, self.saved, self.evaluated = [], [], []

    def on_log(self, record):
        self.records.append(record)

    def on_save(self):
        self.saved.append(self.trainer.step)

    def on_evaluate(self):
        torch.rand(17)  # an evaluation may draw random numbers
        self.evaluated.append(self.trainer.step)


# ---------------------------------------------------------------------- optimiser and schedule


def test_learning_rate_warms_up_from_a_third_and_falls_at_milestones():
    config = TrainConfig(lr=0.3, warmup_steps=10, warmup_factor=1 / 3, milestones=(20, 30), gamma=0.1)
    expected = {0: 0.1, 5: 0.2, 10: 0.3, 19: 0.3, 20: 0.03, 29: 0.03, 30: 0.003}
    for step, rate in expected.items():
        assert learning_rate(step, config) == pytest.approx(rate)
    assert learning_rate(0, dataclasses.replace(config, warmup_steps=0)) == 0.3


def test_biases_learn_twice_as_fast_and_do_not_decay():
    model = TinyDetector(3)
    model.locate.weight.requires_grad_(False)
    optimizer = build_optimizer(model, CONFIG)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name == "locate.weight":
            assert id(parameter) not in group_of
            continue
        group = group_of[id(parameter)]
        bias = name.endswith("bias")  # of convolutions, linear layers and batch norm alike
        assert (group["lr_factor"], group["weight_decay"]) == ((2.0, 0.0) if bias else (1.0, 1e-4)), name


def test_one_step_is_sgd_by_hand():
    model = TinyDetector(3)
    model.drop = 0
    trainer = new_trainer(dataclasses.replace(CONFIG, steps=1), model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    images, targets = next(batches())
    sum(model(images, targets).values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    trainer.fit()
    rate = CONFIG.lr / 3
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            step = 2 * rate * gradients[name]
        else:
            step = rate * (gradients[name] + 1e-4 * before[name])
        torch.testing.assert_close(parameter.detach(), before[name] - step)


def test_one_step_is_adamw_by_hand():
    model = TinyDetector(3)
    model.drop = 0
    trainer = new_trainer(dataclasses.replace(CONFIG, steps=1, optimizer="adamw", momentum=0.8), model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    images, targets = next(batches())
    sum(model(images, targets).values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    trainer.fit()
    for name, parameter in model.named_parameters():
        rate = CONFIG.lr / 3 * (2 if name.endswith("bias") else 1)
        decay = 0.0 if name.endswith("bias") else 1e-4
        # The first step's moments, their bias corrected, are the gradient and its square.
        step = rate * (gradients[name] / (gradients[name].abs() + 1e-8) + decay * before[name])
        torch.testing.assert_close(parameter.detach(), before[name] - step)
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.8, 0.999)}


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="trainable"):
        build_optimizer(TinyDetector(3).requires_grad_(False), CONFIG)


def test_accumulated_micro_batches_equal_one_batch():
    results = []
    for accumulate, size in ((1, 4), (2, 2), (4, 1)):
        model = TinyDetector(3)
        model.drop = 0
        model.features[1] = nn.Identity()  # batch norm would see other batches
        torch.manual_seed(3)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        recorder = Recorder()
        trainer = new_trainer(dataclasses.replace(CONFIG, accumulate=accumulate), model, recorder, size)
        recorder.trainer = trainer
        trainer.fit()
        results.append((weights(trainer), [record["loss"] for record in recorder.records]))
    for other, losses in results[1:]:
        torch.testing.assert_close(other, results[0][0], rtol=1e-5, atol=1e-6)
        assert losses == pytest.approx(results[0][1], rel=1e-5)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_gradient_clipping_bounds_the_step(amp):
    config = dataclasses.replace(CONFIG, steps=1, clip_grad_norm=1e-3, weight_decay=0.0, bias_lr_factor=1.0, amp=amp)
    trainer = new_trainer(config)
    before = weights(trainer)
    trainer.fit()
    assert (weights(trainer) - before).norm().item() == pytest.approx(1e-3 * CONFIG.lr / 3, rel=1e-3)


def test_average_follows_its_formula_and_copies_buffers():
    model = TinyDetector(3)
    average = WeightAverage(model, decay=0.5)
    value = start = model.classify.weight.detach().clone()
    for n in range(1, 15):
        with torch.no_grad():
            model.classify.weight.fill_(n)
            model.features[1].running_mean.fill_(n)
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        value = decay * value + (1 - decay) * n
    torch.testing.assert_close(average.model.classify.weight.detach(), value)
    assert not torch.equal(value, start)
    assert average.model.features[1].running_mean.eq(14).all()
    assert not any(p.requires_grad for p in average.model.parameters())


def test_the_average_is_what_gets_evaluated():
    trainer = new_trainer(dataclasses.replace(CONFIG, ema_decay=0.9))
    trainer.fit()
    assert trainer.average.updates == CONFIG.steps
    assert trainer.evaluated_model is trainer.average.model
    assert not torch.equal(trainer.evaluated_model.classify.weight, trainer.model.classify.weight)
    assert new_trainer().evaluated_model is not None


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_computes_in_its_type_and_keeps_fp32_weights(amp, dtype):
    seen = []
    trainer = new_trainer(dataclasses.replace(CONFIG, amp=amp, steps=20, milestones=()))
    trainer.model.classify.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    plain = new_trainer(dataclasses.replace(CONFIG, steps=20, milestones=()))
    start = weights(plain)
    trainer.fit()
    plain.fit()
    assert set(seen) == {dtype}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    # Unscaled by the scaler before the step: the way gone is that of full precision, about.
    way, other = weights(trainer) - start, weights(plain) - start
    assert (way - other).norm() < 0.1 * other.norm()
    assert bool(trainer.state_dict()["scaler"]) == (amp == "fp16")


def test_channels_last_and_its_absence():
    kernel = new_trainer().model.features[0].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    kernel = new_trainer(dataclasses.replace(CONFIG, channels_last=False)).model.features[0].weight
    assert kernel.is_contiguous()


# ---------------------------------------------------------------------- the loop


def test_when_it_logs_saves_and_evaluates():
    recorder = Recorder()
    config = dataclasses.replace(CONFIG, steps=10, log_every=4, checkpoint_every=5, eval_every=4)
    trainer = recorder.trainer = new_trainer(config, hooks=recorder)
    trainer.fit()
    assert [record["step"] for record in recorder.records] == [4, 8, 10]
    assert recorder.evaluated == [4, 8, 10]
    assert recorder.saved == [4, 5, 8, 10]  # before each evaluation too


def test_log_records_hold_the_mean_losses_and_the_rate_used():
    every, pairs = Recorder(), Recorder()
    every.trainer = new_trainer(dataclasses.replace(CONFIG, log_every=1), hooks=every)
    every.trainer.fit()
    pairs.trainer = new_trainer(dataclasses.replace(CONFIG, log_every=2), hooks=pairs)
    pairs.trainer.fit()
    for record, one, two in zip(pairs.records, every.records[::2], every.records[1::2], strict=True):
        for name in ("loss", "loss_cls", "loss_box"):
            assert record[name] == pytest.approx((one[name] + two[name]) / 2, rel=1e-6)
        assert record["loss"] == pytest.approx(record["loss_cls"] + record["loss_box"])
        assert record["lr"] == learning_rate(record["step"] - 1, CONFIG)
        assert record["images_per_second"] > 0 and record["time"] > 0
    assert every.records[0]["loss_cls"] > every.records[-1]["loss_cls"]  # and it learns


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank_alone():
    def draws(*key):
        seed_step(*key)
        return torch.rand(3).tolist()

    assert draws(0, 5) == draws(0, 5)
    assert len({tuple(draws(*key)) for key in ((0, 5), (1, 5), (0, 6), (0, 5, 1), (5, 0))}) == 5


def test_evaluation_changes_nothing_in_training():
    recorder = Recorder()
    plain, evaluated = new_trainer(), new_trainer(dataclasses.replace(CONFIG, eval_every=1), hooks=recorder)
    recorder.trainer = evaluated
    plain.fit()
    evaluated.fit()
    assert len(recorder.evaluated) == CONFIG.steps
    assert torch.equal(weights(plain), weights(evaluated))


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "amp": "fp16"}, {"accumulate": 2}, {"optimizer": "adamw"}])
def test_a_state_restored_in_another_trainer_ends_with_the_same_bits(options):
    config = dataclasses.replace(CONFIG, **options)
    size = 4 // config.accumulate
    whole = new_trainer(config, size=size)
    whole.fit()
    part = new_trainer(dataclasses.replace(config, steps=3), size=size)
    part.fit()
    state = part.state_dict()
    rest = new_trainer(config, model=TinyDetector(3), size=size)
    torch.manual_seed(99)
    rest.load_state_dict(state)
    assert rest.step == 3
    rest.fit()
    for name, tensor in whole.evaluated_model.state_dict().items():
        assert torch.equal(tensor, rest.evaluated_model.state_dict()[name]), name
    assert torch.equal(weights(whole), weights(rest))


def test_a_state_of_another_model_is_refused():
    state = new_trainer().state_dict()
    with pytest.raises(UserError, match="does not fit"):
        new_trainer(model=TinyDetector(5)).load_state_dict(state)


def test_averaging_that_begins_later_begins_with_the_trained_weights():
    part = new_trainer(dataclasses.replace(CONFIG, steps=3))
    part.fit()
    later = new_trainer(dataclasses.replace(CONFIG, ema_decay=0.9), model=TinyDetector(3))
    later.load_state_dict(part.state_dict())
    assert torch.equal(later.average.model.classify.weight, part.model.classify.weight)


# ---------------------------------------------------------------------- losses that are not finite


class Poisoned(TinyDetector):
    """Gives a loss that is not finite for one image."""

    value, image = math.nan, 9

    def losses(self, image, target):
        losses = super().losses(image, target)
        if target["image_id"] == self.image:
            losses["loss_box"] = losses["loss_box"] * self.value
        return losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(value):
    model, recorder = Poisoned(3), Recorder()
    model.value = value
    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    trainer = recorder.trainer = new_trainer(config, model, recorder)
    with pytest.raises(NonFiniteLossError, match=r"step 3: loss_box = (nan|inf); images with ids \[8, 9, 10, 11\]"):
        trainer.fit()
    assert weights(trainer).isfinite().all()
    assert trainer.step == 2 and recorder.saved == [1, 2]


def test_on_a_gpu_losses_are_looked_at_later_and_the_first_bad_step_is_named():
    tracker = LossTracker(World(device=torch.device("cuda")))  # only its kind is looked at
    for step in range(5):
        bad = torch.tensor(math.nan if step >= 2 else 1.0)
        tracker.note(step, {"loss_a": torch.tensor(1.0), "loss_b": bad}, [10 * step, 10 * step + 1])
    with pytest.raises(NonFiniteLossError, match=r"step 3: loss_b = nan; images with ids \[20, 21\]"):
        tracker.check()
    tracker.check()
    with pytest.raises(NonFiniteLossError):  # even when nobody asks
        for step in range(50):
            tracker.note(step, {"loss_a": torch.tensor(math.nan)}, [step])


def test_nothing_is_saved_after_a_bad_loss_nobody_has_looked_at():
    recorder = Recorder()
    trainer = recorder.trainer = new_trainer(
        dataclasses.replace(CONFIG, checkpoint_every=1, log_every=100), hooks=recorder
    )
    trainer.losses._world = World(device=torch.device("cuda"))
    trainer.model.__class__ = Poisoned
    with pytest.raises(NonFiniteLossError, match="step 3"):
        trainer.fit()
    assert recorder.saved == [1, 2]


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "train.steps is 0, a whole number of at least 1 is accepted"),
        ({"lr": math.nan}, "train.lr is nan"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6 images cannot be shared by 1 processes x 4"),
        ({"clip_grad_norm": 0.0}, "train.clip_grad_norm is 0.0, a finite number above 0 or None is accepted"),
        ({"amp": "fp8"}, "train.amp is 'fp8'"),
        ({"optimizer": "lion"}, "train.optimizer is 'lion', one of sgd, adamw"),
        ({"momentum": 1.0}, "train.momentum is 1.0, a finite number of at least 0 and below 1"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0"),
        ({"ema_decay": math.nan}, "train.ema_decay is nan"),
        ({"lr": math.inf}, "train.lr is inf, a finite number of at least 0"),
        ({"gamma": -0.1}, "train.gamma is -0.1, a finite number of at least 0"),
        ({"warmup_factor": math.nan}, "train.warmup_factor is nan"),
        ({"bias_lr_factor": -1.0}, "train.bias_lr_factor is -1.0"),
        ({"horizontal_flip": 2.0}, "train.horizontal_flip is 2.0, a finite number from 0 to 1"),
        ({"milestones": (3, -1)}, r"train.milestones\[1\] is -1, a whole number of at least 0"),
        ({"milestones": None}, "train.milestones is None, a list is accepted"),
        ({"batch_size": 10**6}, "train.batch_size is 1000000, a whole number from 1 to 65536"),
        ({"steps": "many"}, "train.steps is 'many', a whole number of at least 1"),
        ({"seed": 0.5}, "train.seed is 0.5, a whole number of at least 0"),
        ({"accumulate": True}, "train.accumulate is True, a whole number of at least 1"),
        ({"log_every": 20.0}, "train.log_every is 20.0, a whole number of at least 1"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        new_trainer(dataclasses.replace(CONFIG, **change))


def test_batch_is_shared_by_processes_and_accumulation_steps():
    config = dataclasses.replace(CONFIG, batch_size=12, accumulate=2)
    assert micro_batch_size(config, World(size=3)) == 2
    with pytest.raises(ValueError, match="multiple of 10"):
        micro_batch_size(config, World(size=5))
    with pytest.raises(ValueError, match="sync_batch_norm needs CUDA"):
        check_config(dataclasses.replace(CONFIG, sync_batch_norm=True), World(size=2))


def test_too_little_for_a_batch_norm_is_one_clear_error():
    model = TinyDetector(3)
    model.features.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)))
    with pytest.raises(UserError, match="1 picture at a time of up to 40 pixels is too little .* larger --train.batch"):
        new_trainer(dataclasses.replace(CONFIG, batch_size=1), model, size=1).fit()


# ---------------------------------------------------------------------- several processes


class FlatKernel(TinyDetector):
    """A 1x1 kernel is used as a matrix, so that its gradient is not channels last."""

    def __init__(self):
        super().__init__(3)
        self.mix = nn.Conv2d(16, 16, 1)

    def outputs(self, image):
        logits, boxes = super().outputs(image)
        return logits + (self.mix.weight.flatten(1) @ self.classify.weight.flatten()[:16]).sum(), boxes


def test_gradients_have_the_strides_that_ddp_expects(tmp_path, recwarn):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        trainer = new_trainer(model=FlatKernel())
        kernel = trainer.model.mix.weight
        assert kernel.stride() == (16, 1, 16, 16)
        parallel = _parallel(trainer.model, World(size=2))
        sum(parallel(*next(batches())).values()).backward()
        assert kernel.grad.stride() == kernel.stride()
        assert not [w for w in recwarn if "strides" in str(w.message)]
    finally:
        torch.distributed.destroy_process_group()
