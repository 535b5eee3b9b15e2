"""All settings with their defaults, units and ranges. YAML files and `a.b=c` overrides become a `Config`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from slotscops.core.address import Address, hide_secrets
from slotscops.core.errors import UserError, suggest
from slotscops.core.files import PLAIN_NAME, write_bytes

# Pydantic would otherwise turn the text '2e-4', which YAML does not read as a number, into a number unnoticed.
_STRICT = ConfigDict(extra="forbid", strict=True)

# Upper bounds are far beyond what anybody trains, so that a mistyped number, or the settings of a model from elsewhere,
# end in a one-line error and do not use up the memory.
_MANY = 2**31 - 1
_MAX_SETTINGS_BYTES = 1_000_000  # of a YAML file; all settings together take 3,000
Positive = Annotated[int, Field(gt=0, le=_MANY)]
Count = Annotated[int, Field(ge=0, le=_MANY)]
Side = Annotated[int, Field(ge=32, le=8192)]  # pixels
Width = Annotated[int, Field(gt=0, le=65_536)]  # channels
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# These names become a part of a folder's name, and the settings may be a stranger's: no name may lead elsewhere.
PlainName = Annotated[str, Field(pattern=PLAIN_NAME, max_length=200)]
NetworkName = Annotated[str, Field(pattern=PLAIN_NAME.replace("^", "^(timm/)?"), max_length=200)]

# Each choice stands here once; every other module imports it from here.
BaselineTransform = Literal["none", "sqrt", "l2", "sqrt_l2"]  # transforms that need no measurement of the whole cache
Transform = Literal[BaselineTransform, "channel_standardised"]
FeatureStore = Literal["float16", "int8"]
EncoderName = (
    Literal["resnet18", "resnet34", "resnet50", "resnet101", "features"]
    | Annotated[str, Field(pattern=r"^timm/[\w.-]+$")]
)
SlotInit = Literal["learned", "shared_gaussian", "image_conditioned"]
SlotOwnership = Literal["shared", "own"]
SlotGradient = Literal["full", "last_iteration", "bilevel"]
MapsFrom = Literal["head", "attention", "head_only"]
DecoderKind = Literal["scops", "mlp_broadcast", "conv"]
Refinement = Literal["none", "pamr"]
Places = Literal["none", "upright", "facing"]
BasisKind = Literal["relu", "free"]
BasisInit = Literal["random", "kmeans", "uneven_kmeans", "single_kmeans"]
CandidateCriterion = Literal["agreement", "likelihood"]
TargetMask = Literal["none", "object", "guessed"]
OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["poly", "cosine", "constant"]
Reduction = Literal["ddp", "deterministic"]
BestScore = Literal["nmi", "ari", "fg_nmi", "fg_ari", "miou", "mask_nmi", "mask_ari"]
MixedPrecision = Literal["no", "bf16"]
# YAML reads an unquoted `no` as false.
Precision = Annotated[MixedPrecision, BeforeValidator(lambda value: "no" if value is False else value)]


@dataclass(frozen=True, config=_STRICT)
class Data:
    # The folder that python -m slotscops.shard wrote, or its URL. Passwords and signed queries in it are never stored.
    shards: Address = Address("shards/toy")
    size: Side = 128  # The side of the square crops, in pixels.
    # Mirroring is the only augmentation. Cached features must match what is done to the photo, so every augmentation
    # needs features of its own (python -m slotscops.features --mirrored), and training refuses to start without them.
    mirror: bool = False  # Training turns each sample left to right with probability 1/2.
    num_workers: Annotated[int, Field(ge=0, le=1024)] = (
        1  # Loader processes for each training process. 0 reads in the training process itself.
    )
    # The largest share of a split's samples that may be damaged. Training ends when more of them are.
    max_damaged_share: Annotated[float, Field(ge=0, le=1)] = 0.001


@dataclass(frozen=True, config=_STRICT)
class TeacherSettings:
    network: NetworkName = "vgg19"  # Any of torchvision's classification networks, or of timm's as timm/NAME.
    # The layer whose features are the target. "relu5_2+relu5_4" joins the channels of both. Of a transformer of timm,
    # "blocks.8" gives the tokens of a block and "blocks.10.attn.k" its keys.
    layer: PlainName = "relu5_4"
    # Of joined layers, what the features of each are multiplied by in the target, after sqrt or channel_standardised
    # and before l2. null weighs all alike.
    layer_weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    size: Annotated[int, Field(gt=0, le=8192)] | None = (
        None  # The side of the crops that the teacher saw, in pixels. null takes data.size.
    )
    weights: str | None = None  # A cache made with other weights than these is refused. null accepts any cache.
    # The form of the cache that is read, as features --components D and --store int8 make it. null and float16 are the
    # features themselves. 64 components of 8 bits take a twelfth of the room of DINOv2's 384 channels.
    components: Width | None = None
    store: FeatureStore = "float16"
    transform: Transform = "none"  # What is done to the features before the parts rebuild them.


@dataclass(frozen=True, config=_STRICT)
class EncoderSettings:
    # "features" reads the cached features and has no backbone. "timm/NAME" is a network of timm.
    name: EncoderName = "resnet50"
    # imagenet or pretrained (the network's own), a .safetensors or .pth file, the URL of a .safetensors file,
    # package:NAME, or random:SEED.
    weights: str = "imagenet"
    frozen_stages: Annotated[int, Field(ge=0, le=64)] = 0  # The first stages that do not train. 1 includes the stem.
    # Each stage or block of a timm network learns by this factor more slowly than the one after it. 1 treats all alike.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True, config=_STRICT)
class Slots:
    num_parts: Annotated[int, Field(ge=1, le=254)] = 5  # K. There is one slot more, for the background.
    dim: Width = 64  # The width of a slot.
    token_hidden: Annotated[int, Field(ge=0, le=65_536)] = (
        0  # The width of a hidden layer between encoder and slots. 0 leaves one linear map.
    )
    iterations: Annotated[int, Field(gt=0, le=100)] = 3
    # "image_conditioned" adds a linear map of the mean token to the learned starts. "shared_gaussian" is the paper's.
    # It stays at chance and is kept for comparison.
    init: SlotInit = "learned"
    # "own" gives each class of objects its own starts and basis rows. The class is guessed from the photo if not given.
    per_class: SlotOwnership = "shared"
    # "last_iteration" (Chang et al. 2022) does not train the starts. "bilevel" (Jia et al. 2023) trains them with a
    # straight-through gradient.
    gradient: SlotGradient = "full"


@dataclass(frozen=True, config=_STRICT)
class Decoder:
    # Where part maps come from: "head" is a decoder on the slots, "attention" the slots' last attention, "head_only"
    # SCOPS' head on the encoder without any slots.
    maps: MapsFrom = "head"
    kind: DecoderKind = "scops"  # The kind of decoder, for maps: head.
    # With kind scops, a 1x1 convolution and a ReLU before the head. The head alone is linear and cannot place a slot.
    mixing: bool = False
    grid: Annotated[int, Field(gt=0, le=1024)] | None = (
        8  # The side of the grid on which each slot is broadcast. null takes the encoder's grid.
    )
    # "pamr" moves the borders of maps that are scored or drawn to where the photo's colours change. It never trains.
    refinement: Refinement = "none"
    # Each part has a place in the object, where the mixture loss and the part maps expect it. "upright" measures places
    # from the object's middle, in its own extent. "facing" also finds for each photo which of its sides is the front.
    places: Places = "none"
    place_spread: Annotated[float, Field(gt=0, le=10)] = 0.3  # How far a part reaches from its place, in half extents.


@dataclass(frozen=True, config=_STRICT)
class Basis:
    kind: BasisKind = "relu"  # "relu" allows no negative numbers, as in the teacher's features.
    # "random" is |N(0,1)|. "kmeans" takes K clusters of a sample of the cached features, those of the lowest inertia.
    # "uneven_kmeans" takes, among clusters of nearly the lowest inertia, those whose sizes differ most. "single_kmeans"
    # takes the clusters of one start, whatever their inertia: with every seed others.
    init: BasisInit = "random"
    # So many starts of k-means are tried: each is trained for candidate_steps steps, and the run then begins from the
    # best one. Nothing of this reads a part label.
    candidates: Annotated[int, Field(ge=1, le=1000)] = 1
    candidate_steps: Positive = 100
    # What the best one is best at, on photos of the training split that the candidates did not train on: "agreement"
    # of the parts of a photo and of its mirror image or a shifted crop, or "likelihood" of the teacher's features.
    choose_by: CandidateCriterion = "agreement"
    candidate_images: Positive = 256  # The number of these photos, but at most a quarter of the split.
    # The directions of the mixture loss: how many each part has, and how many the background has.
    part_directions: Annotated[int, Field(gt=0, le=64)] = 1
    background_directions: Annotated[int, Field(gt=0, le=1024)] = 5


@dataclass(frozen=True, config=_STRICT)
class LossWeights:
    """The weight of each term, by the term's name. A term with weight 0 is not computed."""

    semantic: Rate = 1.0  # The parts rebuild the teacher's features.
    mixture: Rate = 0.0  # Each slot has directions, and every pixel's feature is likely under its own slot's.
    background: Rate = 0.0  # The background lies outside the object mask (cross-entropy). Needs a target_mask.
    concentration: Rate = 0.0  # Each part stays close to its own centre.
    orthonormality: Rate = 0.0  # The rows of the basis differ from each other.
    entropy: Rate = 0.0  # Every pixel belongs to one slot.
    equivariance: Rate = 0.0  # The maps follow a warp of the photo. This doubles the encoder's work.
    landmark_equivariance: Rate = 0.0  # The centres of the parts follow a warp of the photo, at the same cost.
    total_variation: Rate = 0.0  # Borders between the slots are short.
    # Each part is sure of some region of some photo in the batch. Like part_contrast it compares the photos of a
    # microbatch on all processes, or with train.reduction: deterministic those of one of train.microbatches.
    presence: Rate = 0.0
    part_contrast: Rate = 0.0  # A part's features are alike in two photos and unlike those of all other parts.
    visual_consistency: Rate = 0.0  # A part has one colour, in RGB, relative to the crop's area.
    visual_consistency_lab: Rate = 0.0  # A part has one colour, in CIE Lab, relative to the area of all parts.


@dataclass(frozen=True, config=_STRICT)
class Losses(LossWeights):
    entropy_ramp_steps: Count = (
        0  # Steps over which the entropy weight grows from 0. If it acts too early, it kills slots.
    )
    contrast_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    mixture_kappa: Annotated[float, Field(gt=0, le=1000)] = 10.0  # How sharply a direction of the mixture is peaked.
    # "object" sets the semantic loss's target to zero outside the true object, starts the parts from features inside
    # and the mixture's background from features outside. "guessed" does the same with masks that are guessed from the
    # features alone: clusters that lie on the crops' border more often than the others are background.
    target_mask: TargetMask = "none"


@dataclass(frozen=True, config=_STRICT)
class WarpSettings:
    """How the second photo of the equivariance terms is warped. The defaults are SCOPS' published ones, plus jitter."""

    points: Annotated[int, Field(ge=2, le=100)] = 5  # Control points on each side of the thin-plate spline.
    bend: Rate = 0.01  # The standard deviation of the control points' shifts, in half-image units.
    rotation: Rate = 60.0  # The largest rotation, in degrees.
    translation: Rate = 0.1  # The largest shift, in half-image units.
    min_scale: Annotated[float, Field(gt=0)] = 0.7
    max_scale: Annotated[float, Field(gt=0)] = 2.0
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.3  # The largest change of brightness, contrast and saturation.


@dataclass(frozen=True, config=_STRICT)
class Train:
    total_steps: Positive = 20_000
    stop_after_steps: Positive | None = None  # Stop after so many steps of this start, as if interrupted.
    batch_size: Annotated[int, Field(gt=0, le=10_000_000)] = (
        64  # The global batch, over all processes and accumulation steps.
    )
    accumulation_steps: Positive = 1  # Each process splits its share of the batch into so many microbatches.
    optimizer: OptimizerName = "adamw"  # "sgd" is what SCOPS used.
    learning_rate: Rate = 4.0e-4  # The rate of slots, decoder and projection.
    encoder_learning_rate: Rate | None = None  # null takes a tenth of learning_rate.
    basis_learning_rate: Rate | None = None  # null takes learning_rate.
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # Used by sgd only.
    weight_decay: Rate = 5.0e-4  # The basis is never decayed.
    schedule: ScheduleName = "poly"
    warmup_steps: Count = 0
    clip_norm: Rate = 5.0  # The largest norm of the whole gradient. 0 does not clip.
    mixed_precision: Precision | None = None  # null takes what accelerate launch says.
    channels_last: bool = True
    compile: bool = False
    num_processes: Positive | None = None  # Training refuses any other number of processes. null accepts any.
    timeout_minutes: Annotated[float, Field(gt=0, le=43_200)] = (
        30.0  # The run ends if a process waits longer for another one.
    )
    reduction: Reduction = "ddp"  # "deterministic" gives the same bits on any number of processes.
    # The number of parts into which "deterministic" cuts a global batch. The number of processes must divide it.
    microbatches: Positive = 4
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # The decay of averaged weights, which are scored. 0: none.
    log_every_steps: Positive = 20
    save_every_steps: Positive = 500
    keep_checkpoints: Positive = 3  # So many of the newest checkpoints are kept, and the best one.
    # The score on the val split, evaluated while training, that decides which checkpoint is best. null keeps no best.
    best_score: BestScore | None = "nmi"
    eval_every_steps: Count = 1000  # 0 never evaluates while training.
    eval_images: Positive = 512  # Evaluations while training score so many images, the first of the val split.


@dataclass(frozen=True, config=_STRICT)
class Config:
    run_dir: str = "runs/default"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    data: Data = Data()
    teacher: TeacherSettings = TeacherSettings()
    encoder: EncoderSettings = EncoderSettings()
    slots: Slots = Slots()
    decoder: Decoder = Decoder()
    basis: Basis = Basis()
    losses: Losses = Losses()
    warp: WarpSettings = WarpSettings()
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
    settings: dict[str, Any] = {} if path is None else read_yaml(path)
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
    """The settings as they are printed and stored: without the secrets of an address."""
    mapping = dataclasses.asdict(config)
    mapping["data"]["shards"] = str(config.data.shards)
    for section in ("teacher", "encoder"):
        if mapping[section]["weights"] is not None:
            mapping[section]["weights"] = hide_secrets(mapping[section]["weights"])
    return mapping


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def write_config(config: Config, path: Path) -> None:
    write_bytes(path, to_yaml(config).encode())


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file.

    Args:
        option: of the command that names the file.

    Raises:
        UserError: no such file, not YAML, no mapping, or larger than any settings.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MAX_SETTINGS_BYTES + 1)
        if len(text) > _MAX_SETTINGS_BYTES:
            raise UserError(f"{path}: has more than {_MAX_SETTINGS_BYTES:,} characters, which no settings need")
        settings = _parse_yaml(text)
    except RecursionError:
        raise UserError(
            f"{path}: is nested too deeply; settings have two levels, such as 'train: {{total_steps: 500}}'"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give {option} an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not YAML: {reason}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds a {type(settings).__name__}, needed settings such as 'seed: 0'")
    return settings


class _Loader(yaml.SafeLoader):
    """Reads YAML and refuses aliases: with them, a few hundred bytes can expand to gigabytes or contain themselves."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}: settings take no aliases; write the value out", event.start_mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def _parse_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


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
        return _parse_yaml(text)
    except (yaml.YAMLError, RecursionError):
        return text


def _build(settings: dict[str, Any], origin: str) -> Config:
    try:
        # As JSON, because strict validation of Python values wants sections that are dataclasses already.
        return TypeAdapter(Config).validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None
    except RecursionError:
        raise UserError(
            f"{origin}: settings are nested too deeply; they have two levels, such as train.total_steps"
        ) from None


def _explain(error: ValidationError) -> str:
    """The first thing wrong, in one line: what came, what was needed, what to do."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(step) for step in problem["loc"] if not _is_type(step))
    value = problem["input"]
    if problem["type"] == "unexpected_keyword_argument" or problem["type"] == "extra_forbidden":
        return f"unknown setting '{name}'{suggest(name, setting_names())}"
    if problem["type"] == "string_pattern_mismatch":
        return f"{name} is {value!r}; it must be a plain name of letters, digits and the signs _ . + -"
    message = (
        problem["msg"]
        .removeprefix("Input ")
        .replace("should be", "it must be")
        .replace("an object", "a section of settings")
    )
    if name == "encoder.name":  # the other member of its union
        message += ", or timm/NAME for a network of timm"
    if isinstance(value, str) and problem["type"].startswith(("float", "int")):
        return f"{name} is the text {value!r}; {message}{_number_hint(value)}"
    return f"{name} is {value!r}; {message}"


def _is_type(step: int | str) -> bool:
    """Whether a step of pydantic's path to a value names a type, such as one member of a union, and no setting."""
    return step in ("int", "float", "str", "constrained-int") or str(step).startswith("literal[")


def _number_hint(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        return ""
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and "." not in mantissa:
        return f" (YAML reads {text} as text: write {mantissa}.0e{exponent})"
    return f" (write {number:g} without quotes)"


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
