"""`poa evaluate pictures` through its command line, and the page it writes, on an untrained run over the digits."""

import base64
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from poa.backbones import architecture
from poa.cli.main import main
from poa.config import load_recipe, to_yaml
from poa.errors import CheckpointError
from poa.family import Family, FamilyCard, Preprocessing, load
from poa.runtime import resolve_runtime
from poa.train.checkpoint import CheckpointStore, pack_state
from poa.train.heads import load_heads
from poa.train.monitor import preprocessing_of
from poa.train.setup import build_trainer

FEW = ("--num-images", "1", "--map-images", "40", "--num-prototypes", "3", "--num-top", "2", "--perplexity", "8")
ON = ("--images", "digits:test", "--device", "cpu", "--num-workers", "0")
PICTURES = ("attention", "foreground-colours", "map", "matches", "overview", "patch-colours", "prototypes")
STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training leaves it, without the training."""
    config = load_recipe("digits")
    folder = tmp_path_factory.mktemp("pictures") / "run"
    trainer = build_trainer(config, 1, resolve_runtime(config.runtime))
    model = trainer.model
    with torch.no_grad():
        for parameter in model.teacher.heads.parameters():
            parameter.add_(0.1)
    CheckpointStore(folder / "checkpoints", keep=1).save(STEPS, pack_state(model, trainer.optimizer), {}, wait=True)
    how = preprocessing_of(config)
    card = FamilyCard(architecture(config.model), config.model, how, provenance={"steps": STEPS})
    Family(card, model.teacher.backbone).save(folder / "family")
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder, {name: part.clone() for name, part in model.teacher.heads.state_dict().items()}


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.words, self.cells = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.words += data
        if self.tags and self.tags[-1] in ("td", "th") and data.strip():
            self.cells.append(data)


def draw(out, *arguments):
    status = main(["evaluate", "pictures", *map(str, arguments), "--out", str(out)])
    return status, Page(out / "index.html") if status == 0 else None


def test_the_page_holds_everything_and_is_the_same_for_the_same_seed(run, tmp_path, capsys):
    networks = (run[0], "--subnets", "smallest", "intact", "--head", "1")
    status, page = draw(tmp_path / "a", *networks, *ON, *FEW)
    assert status == 0
    assert str(tmp_path / "a" / "index.html") in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"index.html", *(f"{name}.png" for name in PICTURES)}
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    images = [address for address in page.addresses if not address.startswith("#")]
    assert len(images) == 2 * len(PICTURES)
    for image in images:
        assert image.startswith("data:image/webp;base64,")
        Image.open(BytesIO(base64.b64decode(image.partition(",")[2]))).load()
    anchors = [address[1:] for address in page.addresses if address.startswith("#")]
    text = (tmp_path / "a" / "index.html").read_text()
    assert all(f'id="{anchor}"' in text for anchor in anchors)
    assert "url(" not in text
    assert "http" not in text
    assert page.cells[6:12] == ["w48-d2", "57,744", *page.cells[8:11], "attention"]
    assert page.cells[12:] == ["w80-d4", "313,360", "1.000", "100.0%", "100.0%", "attention"]
    assert "prototypes of the teacher's projection head 1" in page.words
    assert draw(tmp_path / "b", *networks, *ON, *FEW)[0] == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_networks_of_any_origin_are_shown_at_another_size_and_the_page_says_how(run, tmp_path):
    load(run[0]).save_subnet("w64-d3", tmp_path / "net")
    networks = (run[0], tmp_path / "net", "--subnets", "smallest", "--image-size", "16")
    _, page = draw(tmp_path / "out", *networks, *ON, *FEW)
    assert "Compared with net, the intact network" in page.words
    assert "16 × 16 pixels" in page.words
    assert "k-means centres stand in" in page.words


def folder_of(path, num_images, *, num_bad=0):
    path.mkdir()
    for number in range(num_images):
        Image.new("L", (20, 12), 7 * number).save(path / f"{number:02}.png")
    for number in range(num_bad):
        (path / f"bad-{number}.png").write_bytes(b"no image")
    return path


def test_images_that_cannot_be_read_are_named_on_the_page(run, tmp_path, capsys):
    images = folder_of(tmp_path / "images", 20, num_bad=1)
    few = (*FEW[:4], "--num-prototypes", "2", "--num-top", "2", "--perplexity", "3", "--max-bad-share", "0.2")
    on = ("--images", images, *ON[2:])
    status, page = draw(tmp_path / "out", run[0], "--subnets", "intact", *on, *few)
    assert status == 0
    assert "1 images could not be read and were left out: bad-0.png" in page.words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "few"), r"few gives 4 images, the pictures need 8\. Give more, or ask for fewer"),
        (("--images", "empty"), "no images found"),
        (("--images", "missing"), "there is no"),
        (("--subnets", "all"), "pictures show 1 to 8 networks side by side; got 9"),
        (("--image-size", "15"), "multiple of the patch size 4, the nearest is 16"),
        (("--head", "9"), r"head must be 0 to 1: the run has 2 heads; got 9"),
        (("--num-images", "0"), "num_images must be 1 or more; got 0"),
        (("--map-images", "5"), "map_images must be 8 or more"),
        (("--map", "umap"), "pip install umap-learn"),
    ],
)
def test_mistakes_are_named_before_images_are_read(run, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    monkeypatch.setattr("poa.evaluate.pictures.gallery.extract_features", None)
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "few", 4)
    (tmp_path / "empty").mkdir()
    assert draw(tmp_path / "out", run[0], *ON, *arguments)[0] == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error


def test_networks_for_images_of_other_channels_are_named_before_images_are_read(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("poa.data.digits.DigitsSource.load", None)
    config = replace(load_recipe("digits").model, num_channels=3)
    kind = architecture(config)
    family = Family(FamilyCard(kind, config, Preprocessing(8, 3, (0.5,), (0.5,))), kind.build(config))
    family.save(tmp_path / "colour")
    networks = (run[0], tmp_path / "colour", "--subnets", "intact")
    assert draw(tmp_path / "out", *networks, *ON)[0] == 1
    assert "different numbers of channels" in capsys.readouterr().err


def test_an_output_directory_that_cannot_be_written_is_named_before_images_are_read(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("poa.evaluate.pictures.gallery.extract_features", None)
    (tmp_path / "file").write_text("")
    assert draw(tmp_path / "file" / "out", run[0], *ON)[0] == 1
    assert f"cannot write {tmp_path / 'file' / 'out' / 'index.html'}" in capsys.readouterr().err


def test_the_heads_of_a_run_are_its_teachers(run):
    folder, expected = run
    found = load_heads(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], part) for name, part in expected.items())
    assert load_heads(folder / "family") is None


def test_heads_that_do_not_belong_to_the_family_are_refused_and_removed_ones_are_none(run, tmp_path):
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    store = CheckpointStore(folder / "checkpoints", keep=1)
    store.save(STEPS + 1, {}, {}, wait=True)
    with pytest.raises(CheckpointError, match="is of step 4, its family of step 3"):
        load_heads(folder)
    shutil.rmtree(folder / "checkpoints")
    assert load_heads(folder) is None
