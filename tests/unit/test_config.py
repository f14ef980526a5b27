import dataclasses

import pytest
import yaml

from poa.config import (
    AugmentConfig,
    HeadsConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
    ViTConfig,
    from_dict,
    load_recipe,
    load_yaml,
    recipe_names,
    to_dict,
    to_yaml,
)
from poa.config.files import differences, merged
from poa.errors import ConfigError

UNUSUAL = PretrainConfig(
    model=ViTConfig(widths=(32, 64), depths=(1, 3), head_dim=16, image_size=32, num_channels=1, init_values=None),
    heads=HeadsConfig(num_prototypes=(8,)),
    augment=AugmentConfig(num_local_crops=0, mean=(0.5,), std=(0.25,)),
    optim=OptimConfig(base_lr=1e-7, final_lr=3e-12, accumulate=2),
    train=TrainConfig(epochs=0.5, batch_size=8),
)


@pytest.mark.parametrize("config", [PretrainConfig(), UNUSUAL], ids=["defaults", "unusual"])
def test_configuration_survives_dictionaries_and_yaml(config, tmp_path):
    assert from_dict(PretrainConfig, to_dict(config), "here") == config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_dict(PretrainConfig, load_yaml(tmp_path / "config.yaml"), "here") == config


def test_absent_options_take_their_defaults():
    assert from_dict(PretrainConfig, {}, "here") == PretrainConfig()
    assert from_dict(PretrainConfig, {"train": {"seed": 3}}, "here").train == TrainConfig(seed=3)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_small_numbers_in_yaml_are_numbers_however_they_are_written(text):
    config = from_dict(PretrainConfig, yaml.safe_load(f"optim: {{base_lr: {text}}}"), "here")
    assert config.optim.base_lr == 1e-4


def test_whole_numbers_serve_as_floats():
    epochs = from_dict(PretrainConfig, {"train": {"epochs": 3}}, "here").train.epochs
    assert isinstance(epochs, float)
    assert epochs == 3.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "no option trian; did you mean 'train'"),
        ({"train": {"epoch": 3}}, r"no option train\.epoch; did you mean 'epochs'"),
        ({"optim": {"learning_rate_base": 3}}, r"no option optim\.learning_rate_base"),
        ({"optim": {"xyzxyz": 3}}, r"no option optim\.xyzxyz\.$"),
        ({1: {}}, "no option 1"),
    ],
)
def test_unknown_option_is_refused_with_the_nearest(values, message):
    with pytest.raises(ConfigError, match=f"here: there is {message}"):
        from_dict(PretrainConfig, values, "here")


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("train", "batch_size", "many"),
        ("train", "batch_size", 32.5),
        ("train", "batch_size", None),
        ("train", "epochs", "long"),
        ("train", "epochs", None),
        ("train", "epochs", [1]),
        ("optim", "base_lr", "fast"),
        ("optim", "base_lr", {"a": 1}),
        ("data", "source", 3),
        ("model", "widths", "384"),
        ("model", "widths", 384),
        ("model", "widths", [384.5]),
        ("objective", "targets", "softmax"),
        ("runtime", "device", "tpu"),
    ],
)
def test_value_of_the_wrong_type_is_refused_with_file_and_option(section, option, value):
    with pytest.raises(ConfigError, match=rf"here: .*{section}\.{option}"):
        from_dict(PretrainConfig, {section: {option: value}}, "here")


@pytest.mark.parametrize("value", [None, 3, [1, 2], "text"])
def test_section_that_is_no_section_is_refused(value):
    with pytest.raises(ConfigError, match="train must be a section of options"):
        from_dict(PretrainConfig, {"train": value}, "here")


BAD_VALUES = [
    ("train", "epochs", 0.0),
    ("train", "epochs", -1.0),
    ("train", "epochs", float("nan")),
    ("train", "epochs", float("inf")),
    ("train", "batch_size", 1),
    ("train", "seed", -1),
    ("train", "checkpoint_every", 0),
    ("train", "keep_checkpoints", 0),
    ("train", "log_every", 0),
    ("train", "max_skipped_steps", 0),
    ("monitor", "every", -1),
    ("monitor", "num_images", 3),
    ("runtime", "num_workers", -2),
    ("runtime", "num_threads", -1),
    ("data", "max_bad_share", 1.5),
    ("data", "max_pixels", 0),
    ("model", "widths", ()),
    ("model", "widths", (128, 64)),
    ("model", "widths", (64, 64)),
    ("model", "widths", (100, 128)),
    ("model", "depths", (0, 1)),
    ("model", "head_dim", 0),
    ("model", "patch_size", 0),
    ("model", "image_size", 225),
    ("model", "num_channels", 0),
    ("model", "mlp_ratio", 0),
    ("model", "mlp_ratio", float("inf")),
    ("model", "mlp_ratio", 0.001),
    ("model", "mlp", "relu"),
    ("model", "mlp", "swiglu"),
    ("model", "position", "sine"),
    ("model", "rope_temperature", 0.0),
    ("model", "norm_eps", 1e-5),
    ("model", "init_values", 0.0),
    ("model", "drop_path", 1.0),
    ("model", "draw_emphasis", 0.5),
    ("heads", "num_prototypes", ()),
    ("heads", "num_prototypes", (1,)),
    ("heads", "hidden_dim", 0),
    ("heads", "bottleneck_dim", 0),
    ("objective", "intact_weight", 1.1),
    ("objective", "class_weight", -1.0),
    ("objective", "student_temp", 0.0),
    ("objective", "teacher_temp", -0.1),
    ("objective", "sinkhorn_iterations", 0),
    ("objective", "center_momentum", 2.0),
    ("augment", "num_local_crops", -1),
    ("augment", "local_size", 0),
    ("augment", "global_scale", (0.9, 0.2)),
    ("augment", "local_scale", (0.0, 0.2)),
    ("augment", "flip_prob", 1.5),
    ("augment", "blur_probs", (0.0, 0.0, 2.0)),
    ("augment", "hue", 0.6),
    ("augment", "blur_kernel", 8),
    ("augment", "solarize_threshold", 300),
    ("augment", "std", (0.1, 0.1, 0.0)),
    ("augment", "std", (0.1,)),
    ("mask", "prob", -0.1),
    ("mask", "ratio", (0.5, 0.1)),
    ("mask", "min_aspect", 0.0),
    ("mask", "min_patches", 0),
    ("optim", "base_lr", 0.0),
    ("optim", "base_lr", float("nan")),
    ("optim", "schedule_stretch", 0.5),
    ("optim", "warmup_epochs", -1.0),
    ("optim", "warmup_epochs", float("inf")),
    ("optim", "clip_grad", -1.0),
    ("optim", "beta1", 1.0),
    ("optim", "beta2", 1.0),
    ("optim", "ema_momentum", 1.5),
    ("optim", "accumulate", 0),
]


@pytest.mark.parametrize(("section", "option", "value"), BAD_VALUES)
def test_value_out_of_range_is_refused_with_the_options_name_and_what_was_got(section, option, value):
    field = {field.name: field for field in dataclasses.fields(PretrainConfig)}[section]
    with pytest.raises(ConfigError) as caught:
        field.default_factory(**{option: value})
    assert f"{section}.{option} must be" in str(caught.value)
    assert f"got {value[-1] if option == 'blur_probs' else value!r}" in str(caught.value)


def test_losses_cannot_all_be_off():
    with pytest.raises(ConfigError, match="not both 0"):
        from_dict(PretrainConfig, {"objective": {"class_weight": 0.0, "patch_weight": 0.0}}, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"augment": {"local_size": 90}},
            r"augment\.local_size must be a multiple of model\.patch_size 16, .* 96; got 90",
        ),
        ({"augment": {"local_size": 3}}, r"for example 16; got 3"),
        (
            {"model": {"position": "rope", "norm_eps": 1e-4}},
            r"model\.norm_eps must be 1e-06 or, with model\.init_values, 1e-05; got 0\.0001",
        ),
        ({"model": {"position": "rope", "norm_eps": 1e-5, "init_values": None}}, r"model\.norm_eps must be 1e-06"),
        ({"model": {"position": "rope", "no_embed_class": True}}, r"model\.no_embed_class must be False with .* rope"),
        (
            {"model": {"position": "rope", "widths": [12, 18], "head_dim": 6}},
            r"model\.head_dim must be a multiple of 4 with position rope; got 6",
        ),
        ({"model": {"mlp": "swiglu"}}, r"model\.mlp must be gelu or swiglu_packed with learned positions"),
        (
            {"model": {"mlp_ratio": 0.03, "widths": [32, 64], "head_dim": 32}},
            r"so large that the width 32 has a hidden",
        ),
        ({"model": {"num_channels": 4}}, r"augment\.mean .* of length 1 or model\.num_channels 4"),
        ({"train": {"batch_size": 64}, "optim": {"accumulate": 3}}, r"optim\.accumulate must be a divisor"),
        ({"train": {"batch_size": 4}, "optim": {"accumulate": 4}}, r"micro-batches of 2 or more; got 4"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(PretrainConfig, values, "here")


def test_size_of_local_crops_does_not_matter_where_there_are_none():
    config = from_dict(PretrainConfig, {"augment": {"num_local_crops": 0, "local_size": 90}}, "here")
    assert config.augment.local_size == 90


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", "got a list"),
        (b"a: b: c\n", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_yaml(tmp_path / "file.yaml")


def test_missing_file_is_refused_and_an_empty_one_holds_nothing(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "file.yaml")
    (tmp_path / "file.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "file.yaml") == {}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name):
    assert isinstance(load_recipe(name), PretrainConfig)


def test_the_default_recipe_of_the_command_line_is_there():
    from poa.cli.pretrain import DEFAULT_RECIPE

    assert DEFAULT_RECIPE in recipe_names()


def test_unknown_recipe_names_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"did you mean 'digits'.*Recipes: "):
        load_recipe("digit")


def test_merging_goes_section_by_section_and_leaves_its_arguments_alone():
    base = {"train": {"epochs": 1.0, "seed": 0}, "model": {"widths": [32, 64]}}
    over = {"train": {"epochs": 2.0}, "model": {"widths": [16]}}
    assert merged(base, over) == {"train": {"epochs": 2.0, "seed": 0}, "model": {"widths": [16]}}
    assert base == {"train": {"epochs": 1.0, "seed": 0}, "model": {"widths": [32, 64]}}


def test_differences_name_every_option_that_differs():
    left = to_dict(PretrainConfig())
    right = merged(left, {"train": {"epochs": 2.0}, "model": {"widths": [384, 1024]}, "new": 1})
    assert differences(left, left) == {}
    assert differences(left, right) == {
        "model.widths": (left["model"]["widths"], [384, 1024]),
        "train.epochs": (100.0, 2.0),
        "new": (None, 1),
    }


def test_options_of_a_start_need_a_source():
    with pytest.raises(ConfigError, match=r"init\.reorder must be left alone without init\.source"):
        from_dict(PretrainConfig, {"init": {"reorder": False}}, "test")
    assert not from_dict(PretrainConfig, {"init": {"source": "net", "reorder": False}}, "test").init.reorder
