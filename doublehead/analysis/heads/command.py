"""`doublehead analyze heads`: features, training, evaluation and the record; see `options.Heads`."""

from __future__ import annotations

from doublehead.analysis.heads import features, record
from doublehead.analysis.heads.reading import Reader, readables
from doublehead.analysis.heads.setup import Setup, features_folder, open_setup
from doublehead.analysis.heads.training import SideBySide, sampling_of
from doublehead.analysis.options import Heads
from doublehead.engine.distributed import World
from doublehead.engine.logs import say
from doublehead.engine.schedule import describe


def run(options: Heads, world: World) -> None:
    """Train what is missing and write the results.

    Raises:
        UserError: an option is invalid, `out` holds something else, or data or checkpoint cannot be used.
        Stopped: after SIGTERM or Ctrl-C; the same command goes on.
    """
    setup = open_setup(options, world)
    for train in (True, False):
        dataset = setup.train_set if train else setup.val_set
        folder = features_folder(setup.folder, train)
        mirrored = setup.mirrored and train
        world.on_main(
            lambda folder=folder, dataset=dataset, train=train, mirrored=mirrored: features.build(
                folder, setup.model, dataset, train, mirrored, setup.recipe.data.workers
            ),
            long=True,
        )
    if world.is_main:
        _say_plan(setup)
    mine = [seed for number, seed in enumerate(options.seeds) if number % world.size == world.rank]
    for seed in mine:
        train_seed(setup, seed, shown=world.is_main)
    world.barrier(long=True)  # with an odd seed, one process trains much longer than the others
    world.on_main(lambda: record.write_results(setup, setup.folder))


def train_seed(setup: Setup, seed: int, shown: bool) -> None:
    """Train all heads of a seed, from where an earlier call stopped, and save what came out; done ones are left."""
    options, detector = setup.options, setup.model.detector
    training = SideBySide(
        setup.specs, setup.features(train=True), detector.roi_pooling.strides, detector.num_classes,
        seed, options.steps, options.images, setup.recipe.train.horizontal_flip,
    )  # fmt: skip
    reader = Reader(
        setup.features(train=False), setup.val_set, setup.model.transform, detector.roi_pooling.strides,
        detector.min_side, options.windows,
    )  # fmt: skip
    log = record.SeedLog(seed)
    state_file = setup.folder / f"seed-{seed}.pt"
    if saved := record.load_state(state_file, setup.digest):
        training.load_state_dict(saved["training"])
        log = record.SeedLog(seed, saved["results"], saved["heads"])
        log.check(state_file, setup, training.step)
        if shown and training.step < options.steps:
            say(f"seed {seed}: goes on after step {training.step} of {options.steps}")

    def evaluate() -> None:
        last = training.step == options.steps
        wanted = readables(setup.members, every=last)
        heads = {spec: learner.evaluated for spec, learner in training.learners.items()}
        metrics, windows = reader.read(heads, wanted)
        log.add(training, wanted, metrics, windows, setup.members)
        if last:
            record.save_models(setup, heads, wanted, metrics, seed)
        if shown:
            say(f"seed {seed}, step {training.step}: {log.summary(training.step)}")

    def save() -> None:
        record.save_state(state_file, setup.digest, training.state_dict(), log)

    training.run(setup.pauses, evaluate, options.save_every, save, shown)
    _save_missing_models(setup, training, reader, seed)


def _save_missing_models(setup: Setup, training: SideBySide, reader: Reader, seed: int) -> None:
    """Write the detectors that an earlier call was not asked for, and those that were removed."""
    members = [member for member in setup.members if not record.is_saved(setup, member, seed)]
    if wanted := readables(members, every=False):
        heads = {spec: training.learners[spec].evaluated for member in members for spec in member.heads.values()}
        metrics, _ = reader.read(heads, wanted)
        record.save_models(setup, heads, wanted, metrics, seed)


def _say_plan(setup: Setup) -> None:
    files = [setup.features(train) for train in (True, False)]
    size = sum(file.index["bytes"] for file in files) / 2**20
    samplings = {sampling_of(spec.roi).samples for spec in setup.specs}
    say(
        f"features  {len(setup.train_set)} training and {len(setup.val_set)} validation images, {size:,.0f} MiB in "
        f"{setup.folder / 'features'}"
    )
    say(
        f"heads     {len(setup.specs)} to train side by side for {len(setup.members)} detectors, "
        f"{setup.options.steps} steps of {setup.options.images} images, up to "
        f"{' or '.join(map(str, sorted(samplings)))} RoIs of each; seeds {', '.join(map(str, setup.options.seeds))}"
    )
    say(f"schedule  {setup.recipe.train.optimizer}, {setup.recipe.train.lr:g}, {describe(setup.recipe.train)}")
