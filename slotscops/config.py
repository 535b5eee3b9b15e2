"""Every setting on one page, its default, its unit and its range; YAML and `a.b=c` overrides become a `Config`."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from slotscops.core.errors import UserError
from slotscops.core.files import write_bytes

# Strict: the text '2e-4', which YAML does not read as a number, must not become one unnoticed.
_STRICT = ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
# YAML reads a bare `no` as false.
Precision = Annotated[Literal["no", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=_STRICT)
class Data:
    shards: str = "shards/toy"  # folder written by python -m slotscops.shard
    size: Annotated[int, Field(ge=32)] = 128  # side of the square crops, pixels
    # The one augmentation. The cached features must follow what is done to a photo, so another one needs, as this does,
    # features of its own (python -m slotscops.features --mirrored) and a refusal in startup where they are not there.
    mirror: bool = False  # in training, turn each sample left to right with probability 1/2
    num_workers: Count = 1  # loader processes per training process; 0 reads in the training process
    max_damaged_share: Annotated[float, Field(ge=0, le=1)] = 0.001  # of the split; more damaged samples end the run


@dataclass(frozen=True, config=_STRICT)
class Teacher:
    network: str = "vgg19"  # any of torchvision's classification networks
    layer: str = "relu5_4"  # of it, whose features are the target; "relu5_2+relu5_4" joins channels
    size: Positive | None = None  # side the crops had when it saw them, pixels; null: data.size
    weights: str | None = None  # refuse a cache made with other weights than these; null: take the cache as it is
    transform: Literal["none", "sqrt", "channel_standardised", "l2", "sqrt_l2"] = "none"  # of the target


@dataclass(frozen=True, config=_STRICT)
class Encoder:
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "features"] = "resnet50"  # features: no backbone
    weights: str = "imagenet"  # imagenet (torchvision's own), a .safetensors or .pth file, or random:SEED
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0  # stages of the ResNet that do not train; 1 includes the stem


@dataclass(frozen=True, config=_STRICT)
class Slots:
    num_parts: Annotated[int, Field(ge=1, le=254)] = 5  # K; one slot more is the background
    dim: Positive = 64
    token_hidden: Count = 0  # width of a hidden layer before the slots; 0: a linear map alone
    iterations: Positive = 3
    # shared_gaussian stays at chance; for the record. image_conditioned: learned, plus a linear map of the mean token
    init: Literal["learned", "shared_gaussian", "image_conditioned"] = "learned"
    # own: each class of objects has its own starts and basis rows; which class, is guessed from the photo if not given
    per_class: Literal["shared", "own"] = "shared"
    # last_iteration (Chang et al. 2022): the starts do not train; bilevel (Jia et al. 2023): they do, straight through
    gradient: Literal["full", "last_iteration", "bilevel"] = "full"


@dataclass(frozen=True, config=_STRICT)
class Decoder:
    # where part maps come from: a decoder, the slots' last attention, or SCOPS' head on the encoder without any slots
    maps: Literal["head", "attention", "head_only"] = "head"
    kind: Literal["scops", "mlp_broadcast", "conv"] = "scops"  # of the decoder, for maps: head
    mixing: bool = False  # scops: 1x1 convolution and ReLU before the head, which alone cannot place a slot
    grid: Positive | None = 8  # side of the grid on which each slot is broadcast; null: the encoder's own
    # of maps that are scored and drawn, never while training; pamr: borders move to where the photo's colours change
    refinement: Literal["none", "pamr"] = "none"


@dataclass(frozen=True, config=_STRICT)
class Basis:
    kind: Literal["relu", "free"] = "relu"  # relu: no negative numbers, as the teacher's features
    # |N(0,1)|, or K clusters of a sample of the cached features: those of the lowest inertia, or of nearly that and of
    # sizes as unlike as can be
    init: Literal["random", "kmeans", "uneven_kmeans"] = "random"


@dataclass(frozen=True, config=_STRICT)
class Losses:
    # Weights; 0 is off and costs nothing.
    semantic: Rate = 1.0  # semantic consistency
    concentration: Rate = 0.0  # each part close to its own centre
    orthonormality: Rate = 0.0  # rows of the basis unlike each other
    entropy: Rate = 0.0  # every pixel sure of its slot
    equivariance: Rate = 0.0  # maps follow a warp of the photo; doubles the encoder's work
    landmark_equivariance: Rate = 0.0  # parts' centres do
    part_contrast: Rate = 0.0  # a part's features: alike in two photos, unlike other parts'
    visual_consistency: Rate = 0.0  # one colour within a part
    # What is no loss weight but belongs to them.
    entropy_ramp_steps: Count = 0  # over which its weight grows from 0: sure of itself too early, a slot dies
    contrast_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    target_mask: Literal["none", "object"] = "none"  # object: outside the true object the target is zero


@dataclass(frozen=True, config=_STRICT)
class Warp:
    """Of the second photo of the equivariance terms; SCOPS' published setting but for the jitter."""

    points: Annotated[int, Field(ge=2)] = 5  # thin-plate spline: so many control points a side
    bend: Rate = 0.01  # deviation of the control points' shifts, half-image units
    rotation: Rate = 60.0  # degrees, at most
    translation: Rate = 0.1  # half-image units, at most
    min_scale: Annotated[float, Field(gt=0)] = 0.7
    max_scale: Annotated[float, Field(gt=0)] = 2.0
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.3  # of brightness, contrast and saturation, at most


@dataclass(frozen=True, config=_STRICT)
class Train:
    total_steps: Positive = 20_000
    stop_after_steps: Positive | None = None  # end early, as if interrupted after that many steps of this start
    batch_size: Positive = 64  # global: over all processes and accumulation steps
    accumulation_steps: Positive = 1  # each process splits its share of the batch into so many microbatches
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd is SCOPS'
    learning_rate: Rate = 4.0e-4  # of slots, decoder and projection
    encoder_learning_rate: Rate | None = None  # null: a tenth of learning_rate
    basis_learning_rate: Rate | None = None  # null: learning_rate
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # sgd only
    weight_decay: Rate = 5.0e-4  # never on the basis
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup_steps: Count = 0
    clip_norm: Rate = 5.0  # largest allowed norm of the whole gradient; 0: no clipping
    mixed_precision: Precision | None = None  # null: what accelerate launch says
    channels_last: bool = True
    compile: bool = False
    num_processes: Positive | None = None  # refuse to start on any other number; null: any
    timeout_minutes: Annotated[float, Field(gt=0)] = 30.0  # a process that waits longer for another one ends the run
    reduction: Literal["ddp", "deterministic"] = "ddp"  # deterministic: same bits on any number of processes
    microbatches: Positive = 4  # of a global batch under deterministic; processes must divide it
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of averaged weights, which are then scored; 0: none
    log_every_steps: Positive = 20
    save_every_steps: Positive = 500
    keep_checkpoints: Positive = 3  # the newest so many stay, and the best
    best_score: str | None = "nmi"  # of the val split, evaluated while training, decides which is best; null: none
    eval_every_steps: Count = 1000  # 0: never
    eval_images: Positive = 512  # the first so many of the val split, for scores while training


@dataclass(frozen=True, config=_STRICT)
class Config:
    run_dir: str = "runs/default"
    seed: Count = 0
    data: Data = Data()
    teacher: Teacher = Teacher()
    encoder: Encoder = Encoder()
    slots: Slots = Slots()
    decoder: Decoder = Decoder()
    basis: Basis = Basis()
    losses: Losses = Losses()
    warp: Warp = Warp()
    train: Train = Train()

    @property
    def teacher_size(self) -> int:
        """Side of the crops when the teacher saw them, pixels."""
        return self.teacher.size or self.data.size


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `a.b=c` overrides; unnamed settings keep their defaults.

    Raises:
        UserError: no such file, not YAML, an unknown setting (with the closest known one), a value of a wrong type.
    """
    settings: dict[str, Any] = {} if path is None else _read_yaml(path)
    origin = "command line" if path is None else str(path)
    config = _build(settings, origin)  # before the overrides, so that an error is blamed on the right place
    if not overrides:
        return config
    for override in overrides:
        _apply_override(settings, override)
    return _build(settings, "command line")


def config_from_mapping(settings: Mapping[str, Any], origin: str) -> Config:
    """A `Config` from nested settings, checked; `origin` names their source in errors."""
    return _build(dict(settings), origin)


def to_mapping(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def write_config(config: Config, path: Path) -> None:
    write_bytes(path, to_yaml(config).encode())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give --config an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not YAML: {reason}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds a {type(settings).__name__}, needed settings such as 'seed: 0'")
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"'{override}' is no setting; write NAME=VALUE, such as train.total_steps=500")
    *folders, leaf = name.split(".")
    for folder in folders:
        below = settings.setdefault(folder, {})
        if not isinstance(below, dict):
            raise UserError(f"{name}: '{folder}' is a single setting, it holds no '{leaf}'")
        settings = below
    settings[leaf] = _parse_value(name, text)


def _parse_value(name: str, text: str) -> Any:
    default: Any = to_mapping(Config())
    for step in name.split("."):
        default = default.get(step) if isinstance(default, dict) else None
    if isinstance(default, str):  # a folder may well be called 2020
        return text
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _build(settings: dict[str, Any], origin: str) -> Config:
    try:
        # As JSON, because strict validation of Python values wants sections that are dataclasses already.
        return TypeAdapter(Config).validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first thing wrong, in one line: what came, what was needed, what to do."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(step) for step in problem["loc"] if step not in ("int", "float", "str", "constrained-int"))
    value = problem["input"]
    if problem["type"] == "unexpected_keyword_argument" or problem["type"] == "extra_forbidden":
        return f"unknown setting '{name}'{suggest(name, setting_names())}"
    message = (
        problem["msg"]
        .removeprefix("Input ")
        .replace("should be", "it must be")
        .replace("an object", "a section of settings")
    )
    if isinstance(value, str) and problem["type"].startswith(("float", "int")):
        return f"{name} is the text '{value}'; {message}{_number_hint(value)}"
    return f"{name} is {value!r}; {message}"


def _number_hint(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return ""
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and "." not in mantissa:
        return f" (YAML reads {text} as text: write {mantissa}.0e{exponent})"
    return f" (write {number:g} without quotes)"


def suggest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?' or an empty string."""
    candidates = list(known)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not close:  # the right name in the wrong section
        close = [c for c in candidates if c.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


def setting_names() -> list[str]:
    """Every setting's dotted name, sections included."""

    def walk(mapping: Mapping[str, Any], prefix: str) -> list[str]:
        names: list[str] = []
        for name, value in mapping.items():
            names.append(f"{prefix}{name}")
            if isinstance(value, Mapping):
                names += walk(value, f"{prefix}{name}.")
        return names

    return walk(to_mapping(Config()), "")
