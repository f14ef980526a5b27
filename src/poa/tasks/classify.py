"""Fine-tuning of a whole network for classification."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poa.config import FinetuneConfig, FitConfig
from poa.data import LabelledImages, hold_out, normalize, with_classes_of
from poa.errors import ConfigError, DataError, ExtractionError
from poa.family import TOLERANCE, Preprocessing
from poa.files import read_json, replace_directory, write_json
from poa.models import Candidate, FamilyMember, TimmCandidate
from poa.randomness import derived_seed, generator
from poa.tasks.fit import Task
from poa.tasks.images import LabelBatch, MeasuredImages, SkippedImages, TrainingImages, loaded
from poa.tasks.scores import MultiLabelScores, Scores, SingleLabelScores
from poa.timm_directory import open_timm_directory
from poa.timm_models import TIMM_PREFIX

DEFAULT_DROP_PATH = 0.1
_HEAD_STD = 0.02


@dataclass(frozen=True)
class ClassificationData:
    """What is trained on and what is measured on, with the same classes.

    Attributes:
        train: the images to train on.
        test: the images to measure on.
        max_bad_share: refuse when more than this share of either cannot be read.
        num_workers: processes that decode.
    """

    train: LabelledImages
    test: LabelledImages
    max_bad_share: float = 0.01
    num_workers: int = 0

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.train.is_multi_label

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class."""
        return self.train.class_names

    @property
    def fingerprint(self) -> str:
        """Changes when the images or their classes do."""
        return f"{self.train.fingerprint} {self.test.fingerprint}"


def classification_data(
    train: LabelledImages,
    test: LabelledImages | None,
    *,
    holdout: float = 0.2,
    seed: int = 0,
    max_bad_share: float = 0.01,
    num_workers: int = 0,
) -> ClassificationData:
    """Checked images: the test images' classes are numbered as the training images'.

    Args:
        train: labelled images.
        test: others to measure on; None: `holdout` of every class of `train` is held out.
        holdout: that share, above 0 and below 1.
        seed: of what is held out.
        max_bad_share: see `ClassificationData`.
        num_workers: see `ClassificationData`.

    Raises:
        DataError: a test image is of a class that no training image is of, there are no labels in `test`, or a class
            is too small to hold an image out.
        ConfigError: `holdout` is no such share.
    """
    if not 0 < holdout < 1:
        raise ConfigError(f"--holdout must be a share above 0 and below 1; got {holdout:g}.")
    if test is None:
        train, test = hold_out(train, holdout, seed)
    else:
        test = with_classes_of(test, train)
    if test.is_multi_label and not test.targets.any():
        raise DataError("no test image has a label: there is nothing to measure.")
    return ClassificationData(train, test, max_bad_share, num_workers)


class ClassificationTask(Task):
    """What fine-tuning of one network and of a family have in common: batches, mixing, the loss, measuring.

    Args:
        data: the images.
        config: what is done to them.
        how: how they reach the network.
        fit_config: batch size and seed.
    """

    def __init__(
        self, data: ClassificationData, config: FinetuneConfig, how: Preprocessing, fit_config: FitConfig
    ) -> None:
        self.data, self.config, self.how, self.seed = data, config, how, fit_config.seed
        self.metric = self.new_scores().metric
        self.training = TrainingImages(data.train, config, how, fit_config.batch_size, fit_config.seed)
        self.measured = MeasuredImages(data.test, how, fit_config.batch_size)
        self.skipped_train = SkippedImages(data.train, data.max_bad_share)
        self.skipped_test = SkippedImages(data.test, data.max_bad_share)

    @property
    def num_classes(self) -> int:
        """The logits."""
        return len(self.data.class_names)

    def num_steps(self) -> int:
        """See `Task.num_steps`."""
        return len(self.training)

    def batches(self, epoch: int) -> Iterator[LabelBatch]:
        """See `Task.batches`."""
        first, last = epoch * self.num_steps(), (epoch + 1) * self.num_steps()
        return loaded(self.training, first, last, self.data.num_workers, self.skipped_train)

    def test_batches(self) -> Iterator[LabelBatch]:
        """The images that are measured on, in order."""
        return loaded(self.measured, 0, len(self.measured), self.data.num_workers, self.skipped_test)

    def new_scores(self) -> Scores:
        """Nothing measured yet."""
        return MultiLabelScores() if self.data.is_multi_label else SingleLabelScores()

    def to_input(self, batch: LabelBatch, device: torch.device) -> Float[Tensor, "B C S S"]:
        """The images normalised on the device."""
        return normalize(batch.images.to(device, non_blocking=True), self.how.mean, self.how.std)

    def mixed(self, batch: LabelBatch, device: torch.device) -> tuple[Float[Tensor, "B C S S"], Float[Tensor, "B K"]]:
        """The images as they are trained on, and for each class how much of it they show.

        Mixup and CutMix are torchvision's, drawn from the seed and the number of the step; labels are smoothed after.
        """
        images, targets = self.to_input(batch, device), batch.targets.to(device, non_blocking=True)
        shares = targets.float() if self.data.is_multi_label else F.one_hot(targets, self.num_classes).float()
        mixer = self._mixer(batch.number)
        if mixer is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derived_seed(self.seed, "mix", batch.number))
                images, shares = mixer(images, shares)
        smoothing = self.config.label_smoothing
        rest = smoothing / 2 if self.data.is_multi_label else smoothing / self.num_classes
        return images, shares * (1 - smoothing) + rest

    def _mixer(self, number: int) -> nn.Module | None:
        from torchvision.transforms import v2

        config = self.config
        mixers = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
        is_mixed, which = generator(self.seed, "mixer", number).random(2)
        if not mixers or is_mixed >= config.mix_prob:
            return None
        chosen: nn.Module = mixers[int(which * len(mixers))]
        return chosen

    def label_loss(self, logits: Float[Tensor, "B K"], shares: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
        """Cross entropy, or with several labels the mean binary cross entropy."""
        if self.data.is_multi_label:
            return F.binary_cross_entropy_with_logits(logits.float(), shares)
        return F.cross_entropy(logits.float(), shares)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """For the record."""


class Classifier(nn.Module):
    """A timm network with a linear classifier on its class vectors."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B K"]:
        """The logits."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


class FinetuneTask(ClassificationTask):
    """Training all of a network with a fresh classifier; the best epoch is that of largest accuracy, or mAP.

    Before anything is trained the network is written and opened again once, as it will be at the end.

    Args:
        candidate: the network, of which a copy is trained.
        data: the images.
        config: size, stochastic depth, augmentation.
        fit_config: batch size and seed.

    Raises:
        ConfigError: the network cannot take images of that size, has no stochastic depth that was asked for, or is of
            a kind whose classifier cannot be written in timm's format.
    """

    def __init__(
        self, candidate: Candidate, data: ClassificationData, config: FinetuneConfig, fit_config: FitConfig
    ) -> None:
        size = config.image_size or candidate.preprocessing.image_size
        super().__init__(data, config, replace(candidate.preprocessing, image_size=size), fit_config)
        self.candidate, self.drop_path = candidate, _drop_path(candidate, config.drop_path)
        head = nn.Linear(candidate.num_features, self.num_classes)
        init_head_(head.weight, head.bias, fit_config.seed)
        self.model: Classifier = Classifier(_network(candidate, size, self.drop_path), head)
        self.identity = f"finetune {candidate.fingerprint} {data.fingerprint} {config}"
        self._rehearse()

    def loss(self, model: nn.Module, batch: LabelBatch, device: torch.device) -> dict[str, Tensor]:
        """See `Task.loss`."""
        images, shares = self.mixed(batch, device)
        return {"label": self.label_loss(model(images), shares)}

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """See `Task.evaluate`: the figures of `SingleLabelScores` or `MultiLabelScores`."""
        scores = self.new_scores()
        for batch in self.test_batches():
            scores.add(model(self.to_input(batch, device)), batch.targets.to(device))
        return scores.figures()

    def describe(self) -> dict[str, Any]:
        """See `ClassificationTask.describe`."""
        return {"network": self.candidate.name, "source": self.candidate.source, "drop_path": self.drop_path}

    def save(self, directory: Path, described: Mapping[str, Any]) -> float:
        """Writes the model so that `timm.create_model("local-dir:DIRECTORY", pretrained=True)` gives its logits.

        It is opened again and compared on random images.

        Args:
            directory: is replaced.
            described: written to `poa.json` beside it.

        Returns:
            ‖written − trained‖ / ‖trained‖ of the logits.

        Raises:
            ExtractionError: they differ by more than `TOLERANCE`, or timm cannot open it; nothing is left behind.
        """
        with replace_directory(directory, overwrite=True) as scratch:
            difference = self._write(scratch)
            record = {**described, "relative_difference": difference, "multi_label": self.data.is_multi_label}
            write_json(scratch / "poa.json", record)
        return difference

    def _write(self, directory: Path) -> float:
        from safetensors.torch import save_file

        trained = copy.deepcopy(self.model).cpu().eval()
        whole, part = _with_classifier(copy.deepcopy(trained.backbone), trained.head)
        save_file(
            {name: value.contiguous() for name, value in whole.state_dict().items()}, directory / "model.safetensors"
        )
        write_json(directory / "config.json", self._timm_config(whole, part))
        size, rng = self.how.image_size, torch.Generator().manual_seed(derived_seed(0, "probe"))
        images = torch.randn(2, self.how.num_channels, size, size, generator=rng)
        try:
            opened = open_timm_directory(directory)
            with torch.inference_mode():
                expected, found = trained(images), opened(images)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ExtractionError(f"timm cannot open what was written: {error}") from error
        difference = float((found - expected).norm() / expected.norm())
        if not difference <= TOLERANCE:
            raise ExtractionError(f"what timm opens differs from what was trained by {difference:.2e} relative.")
        return difference

    def _timm_config(self, whole: nn.Module, part: str) -> dict[str, Any]:
        size, names = self.how.image_size, list(self.data.class_names)
        found = _described(self.candidate, whole, size)
        shown = {"num_classes": len(names), "classifier": part, "input_size": [self.how.num_channels, size, size]}
        return {
            **found,
            "num_classes": len(names),
            "pretrained_cfg": {**found["pretrained_cfg"], **shown},
            "label_names": names,
        }

    def _rehearse(self) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._write(Path(folder))
        except ExtractionError as error:
            own = self.candidate.preprocessing.image_size
            raise ConfigError(
                f"{self.candidate.source} with a classifier, for images of {self.how.image_size} pixels, cannot be "
                f"written in timm's format: {error} Its own size is {own}."
            ) from error


def init_head_(weight: Tensor, bias: Tensor, seed: int) -> None:
    """A fresh classifier, in place: truncated normal of deviation 0.02, bias 0."""
    rng = torch.Generator().manual_seed(derived_seed(seed, "classifier"))
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=_HEAD_STD, generator=rng)
        bias.zero_()


def _network(candidate: Candidate, size: int, drop_path: float) -> nn.Module:
    """A copy of the network for images of that size; a family cuts it for that size itself."""
    if isinstance(candidate, FamilyMember):
        return candidate.family.extract(candidate.subnet, size, drop_path=drop_path).requires_grad_(True)
    return candidate.network(size, drop_path=drop_path).requires_grad_(True)


def _drop_path(candidate: Candidate, asked: float | None) -> float:
    """The rate of stochastic depth: that asked for, else the default where the network has it."""
    has_it = True
    if isinstance(candidate, TimmCandidate):
        kind = type(candidate.model)
        has_it = "drop_path_rate" in inspect.signature(kind).parameters
        if asked and not has_it:
            raise ConfigError(f"timm's {kind.__name__} has no stochastic depth; give --drop-path 0 for it.")
    return (DEFAULT_DROP_PATH if has_it else 0.0) if asked is None else asked


def _with_classifier(network: nn.Module, head: nn.Linear) -> tuple[nn.Module, str]:
    """The timm network with that classifier inside, and its name there."""
    made: Any = network
    made.reset_classifier(head.out_features)
    layer = made.get_classifier()
    is_linear = isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None
    if not is_linear or layer.weight.numel() != head.weight.numel():
        raise ExtractionError(f"timm's {type(made).__name__} has no single linear classifier on its class vector.")
    state = {"weight": head.weight.detach().view_as(layer.weight), "bias": head.bias.detach()}
    layer.load_state_dict(state, strict=True)
    return network.eval(), next(name for name, module in network.named_modules() if module is layer)


def _described(candidate: Candidate, whole: nn.Module, size: int) -> dict[str, Any]:
    """What timm's `config.json` says of the network, before its classes are filled in."""
    made: Any = whole
    if isinstance(candidate, FamilyMember):
        return candidate.family.timm_config(candidate.subnet, size)
    shown = {key: value for key, value in dict(made.pretrained_cfg).items() if _is_plain(value)}
    arguments: dict[str, Any] = {}
    architecture = shown.get("architecture")
    if not candidate.source.startswith(TIMM_PREFIX):
        found = read_json(Path(candidate.source) / "config.json")
        architecture, arguments = found["architecture"], found.get("model_args") or {}
    if size != candidate.preprocessing.image_size and hasattr(made, "set_input_size"):
        arguments = {**arguments, **_size_arguments(made, size)}
    dropped = ("architecture", "url", "file", "hf_hub_id", "hf_hub_filename", "source", "label_names", "state_dict")
    return {
        "architecture": architecture or candidate.source.removeprefix(TIMM_PREFIX).partition(".")[0],
        "num_features": candidate.num_features,
        "model_args": arguments,
        "pretrained_cfg": {key: value for key, value in shown.items() if key not in dropped} | {"custom_load": False},
    }


def _size_arguments(made: Any, size: int) -> dict[str, Any]:  # noqa: ANN401 (timm's classes are not typed)
    """What timm is given for the network as `set_input_size` has left it: a Swin's windows have changed too."""
    blocks = getattr(getattr(made, "layers", [None])[0], "blocks", [None])
    window = getattr(blocks[0], "window_size", None)
    return {"img_size": size, **({} if window is None else {"window_size": list(window)})}


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return value is not None
