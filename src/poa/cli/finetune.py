"""`poa finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from poa.cli.progress import bars
from poa.cli.reading import ReadingOptions
from poa.config import ElasticConfig, FinetuneConfig, FitConfig, RuntimeConfig
from poa.errors import ConfigError, SubnetError

if TYPE_CHECKING:
    from poa.evaluate import Result
    from poa.models import Candidate
    from poa.runtime import Runtime
    from poa.tasks.classify import ClassificationData
    from poa.tasks.finetune import FinetuneReport


@dataclass(frozen=True)
class Finetune:
    """Train a network, or a whole family at once, to classify your labelled images.

    The result in --out: the network with its classifier in `model`, which timm opens without poa; with --elastic the
    family with a classifier for every size in `family`, of which `poa extract` cuts any. Beside it metrics.json and
    curves.png. Stopped, the same command goes on.
    """

    network: Annotated[str, tyro.conf.Positional]
    """A run or family of poa, a directory in timm's format, or timm:NAME."""
    train: Annotated[str, tyro.conf.arg(aliases=("--data",))]
    """Labelled images: a folder with one folder for each class, .parquet or .tar files, or digits:train."""
    out: Path
    """The directory to write."""
    test: str | None = None
    """Labelled images to measure on; without them a part of --train is held out."""
    holdout: float | None = None
    """Share of every class that is held out where there is no --test; 0.2 by default."""
    split_seed: int = 0
    """Of the images that are held out."""
    subnet: str | None = None
    """Of a family the sub-network, w384-d12 for example; `smallest`, `middle` or `intact` too."""
    elastic: bool = False
    """Fine-tune a family with all its sub-networks at once."""
    subnets: tuple[str, ...] | None = None
    """With --elastic: the sub-networks that are measured at the end; all by default."""
    multi_label: bool = False
    """An image may have any number of classes: a folder has a table labels.csv (image,labels; classes with ; between),
    in Parquet the column of labels has lists."""
    untrained: bool = False
    """Start from fresh weights, to see what the given ones are worth."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA where there is one, else MPS, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, else float32."""
    num_workers: int = -1
    """Processes that decode; -1 chooses."""
    reading: OmitArgPrefixes[ReadingOptions] = field(default_factory=ReadingOptions)
    images: OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)
    sharing: OmitArgPrefixes[ElasticConfig] = field(default_factory=ElasticConfig)
    fit: FitConfig = field(default_factory=lambda: FitConfig(ema_decay=0.999))


def run(arguments: Sequence[str]) -> int:
    """Runs the command."""
    command = tyro.cli(Finetune, prog="poa finetune", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
    check_options(command)
    from poa.runtime import resolve_runtime

    candidate = _opened(command)
    wanted = RuntimeConfig(command.device, command.precision, "off", command.num_workers)
    runtime = resolve_runtime(wanted)
    data = _data(command, candidate.preprocessing.num_channels, runtime.num_workers)
    results, report = (_family if command.elastic else _network)(command, candidate, data, runtime)
    _print_summary(command, data, results, report)
    return 0


def check_options(command: Finetune) -> None:
    """Refuses options that do not go together.

    Raises:
        ConfigError: two contradict each other, or one would have no effect.
    """
    if command.elastic and command.subnet is not None:
        raise ConfigError("--elastic trains every sub-network; leave --subnet out (--subnets says which are measured).")
    if not command.elastic:
        if command.subnets is not None:
            raise ConfigError("--subnets is for --elastic. One sub-network is named by --subnet.")
        if command.sharing != ElasticConfig():
            raise ConfigError("--intact-weight, --distill-weight and --distill-temp are for --elastic.")
    if command.subnets == ():
        raise ConfigError("--subnets names none. Give names like w384-d12, or all, smallest, middle, intact.")
    if command.test is not None and command.holdout is not None:
        raise ConfigError("--holdout is for training without --test; give one of the two.")
    if command.test is not None and command.split_seed:
        raise ConfigError("--split-seed is of the images that are held out without --test; leave one of them out.")


def _opened(command: Finetune) -> Candidate:
    from poa.family import read_card
    from poa.models import open_models
    from poa.timm_models import is_family

    spec, name = command.network, command.subnet
    if not spec.startswith("timm:") and is_family(Path(spec)):
        space = read_card(spec).space
        if name is None and not command.elastic:
            raise SubnetError(
                f"{spec} is a family of {len(space)} sub-networks: name one by --subnet ({space.smallest}, "
                f"{space.middle}, {space.intact}, …; `poa subnets {spec}` lists all), or train all with --elastic."
            )
        name = name or str(space.intact)
    elif name is not None or command.elastic:
        option = "--elastic" if command.elastic else "--subnet"
        raise ConfigError(f"{spec} is no family of poa; {option} is for families. Leave it out.")
    found = open_models([spec], [name or "intact"], untrained_seed=command.fit.seed if command.untrained else None)
    if len(found) != 1:
        raise SubnetError(f"--subnet names one sub-network; {name!r} names {len(found)}.")
    return found[0]


def _data(command: Finetune, num_channels: int, num_workers: int) -> ClassificationData:
    from poa.data import open_labelled
    from poa.tasks.classify import classification_data

    config = command.reading.config()
    train = open_labelled(command.train, config, num_channels, multi_label=command.multi_label)
    test = None
    if command.test is not None:
        test = open_labelled(command.test, config, num_channels, multi_label=command.multi_label)
    return classification_data(
        train,
        test,
        holdout=0.2 if command.holdout is None else command.holdout,
        seed=command.split_seed,
        max_bad_share=command.reading.max_bad_share,
        num_workers=num_workers,
    )


def _network(
    command: Finetune, candidate: Candidate, data: ClassificationData, runtime: Runtime
) -> tuple[list[Result], FinetuneReport]:
    from poa.tasks.classify import FinetuneTask
    from poa.tasks.finetune import finetune

    task = FinetuneTask(candidate, data, command.images, command.fit)
    with bars() as shown:
        report = finetune(task, command.fit, runtime, command.out, partial(shown.show, "training"))
    return [_result(candidate, report, report.result.best)], report


def _family(
    command: Finetune, candidate: Candidate, data: ClassificationData, runtime: Runtime
) -> tuple[list[Result], FinetuneReport]:
    from poa.evaluate.report import write_csv
    from poa.models import FamilyMember
    from poa.tasks.elastic import ElasticFinetuneTask
    from poa.tasks.finetune import finetune_family

    task = ElasticFinetuneTask(candidate, data, command.images, command.sharing, command.fit)
    subnets = task.family.space.parse_all(list(command.subnets or ("all",)))
    with bars() as shown:
        on_step = partial(shown.show, "training")
        report = finetune_family(task, command.fit, runtime, command.out, subnets, on_step)
    mark = " untrained" if command.untrained else ""
    results = [
        _result(FamilyMember(task.family, subnet, command.network, f"{subnet}{mark}"), report, figures)
        for subnet, figures in (report.subnets or {}).items()
    ]
    write_csv(command.out / "results.csv", results)
    _draw(command.out / "results.png", results)
    return results, report


def _result(candidate: Candidate, report: FinetuneReport, figures: dict[str, float]) -> Result:
    from poa.evaluate import Result

    sizes = (candidate.num_params, candidate.flops)
    return Result("finetune", candidate.name, candidate.source, *sizes, figures, report.metric)


def _draw(path: Path, results: Sequence[Result]) -> None:
    from poa.evaluate.plots import save_front

    label = f"{results[0].headline} on test images, %"
    save_front(path, results, label, title="Fine-tuned once, cut with their classifier")


def _print_summary(
    command: Finetune, data: ClassificationData, results: Sequence[Result], report: FinetuneReport
) -> None:
    from poa.cli.evaluate.options import print_results, report_skipped

    report_skipped(report.skipped)
    title = (
        f"finetune, {len(data.train):,} training and {len(data.test):,} test images, {len(data.class_names)} classes"
    )
    print_results(results, title)
    if data.is_multi_label:
        print(
            f"Images of no class: {data.train.num_without_label} to train on, {data.test.num_without_label} to test on."
        )
    print(f"Best epoch {report.result.best_epoch} of {command.fit.epochs}, {report.seconds:.0f} s.")
    if command.elastic:
        print(f"The family with its classifier: {command.out / 'family'}")
        print(f"Cut any size of it with: poa extract {command.out} {results[0].network.split()[0]} --out NET")
    else:
        print(
            f"Written to {command.out / 'model'}; logits differ by {report.difference:.1e} relative when opened again."
        )
        print(f'Open it with: timm.create_model("local-dir:{command.out / "model"}", pretrained=True)')
    print(f"Figures and curves: {command.out / 'metrics.json'}, {command.out / 'curves.png'}")
