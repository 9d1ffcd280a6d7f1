"""Every field of a run: what it means, its default, the rule that fills it when unset.

A config file (`configs/*.py`) starts from `default_config()` and changes fields. `check_types`
turns it into a frozen `Config`, and `resolve` fills the unset fields and checks all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from flax.core import FrozenDict

from mocosfl_jax.config.ranges import (
    ABOVE_0,
    ABOVE_0_TO_1,
    AT_LEAST_0,
    BY_METHOD,
    EXECUTION,
    FROM_0,
    FROM_0_BELOW_1,
    FROM_1,
    Range,
    at_least,
    marked,
    one_of,
)
from mocosfl_jax.learning.losses import LOSSES
from mocosfl_jax.learning.schedule import SCHEDULES
from mocosfl_jax.models.backbones import BACKBONES
from mocosfl_jax.models.heads import HEADS
from mocosfl_jax.models.resnet import STEMS

Section = TypeVar("Section")

RULE: Any = None
"""Default of a field that `resolve` fills."""

THREE = Range("three numbers are needed", lambda x: len(x) == 3)
PIXELS = Range("numbers from 0 to 1 are needed", lambda x: min(x) >= 0 and max(x) <= 1)
ODD = Range("an odd number is needed", lambda x: x % 2 == 1)
SEED = Range("a number below 2**32 is needed", lambda x: x < 2**32)
STAGES = Range("one count of at least 1 a stage is needed", lambda x: len(x) > 0 and min(x) >= 1)
# GroupNorm squares pixels that were divided by the std, and its gradient has the power -3/2 of that
# variance: below about 1e-10 the latter is 0 in float32, and below 1e-17 the variance is infinite.
STDS = Range("numbers of at least 1e-9 are needed: float32 overflows", lambda x: min(x) >= 1e-9)
# Logits and gradients grow with 1 / T. Below 1e-6 the rounding of a float32 cosine, 6e-8, decides
# the loss; at 1e-12 a few steps make the parameters so large that their squares overflow.
TEMPERATURE = at_least(1e-6, "float32 overflows")


@dataclass(frozen=True)
class Config:
    """The fields of a run. `= RULE` means: unset, filled as the comment says.

    A field marked BY_METHOD is filled only if the method reads it. Unset fields are None, whatever
    their type says. An annotation also says which values are allowed.
    """

    # -------------------------------------------------------------------------------- method
    # The training method: `mocosfl`, `local` (FedAvg, FL-BYOL, FedEMA and others: config.local), or
    # `package.module:NAME` for a `Recipe` of one's own.
    method: str = "mocosfl"

    # ---------------------------------------------------------------------------------- data
    # `synthetic` (procedural, no download), a TFDS name (`cifar10`, `cifar100`, `svhn_cropped`,
    # `stl10`, any image classification set), `folder:PATH`, or `npz:PATH`.
    dataset: str = "cifar10"
    # Folder of prepared TFDS data sets. Rule: the TFDS default, ~/tensorflow_datasets.
    data_dir: Annotated[str | None, EXECUTION] = None
    # TFDS split to train on, TFDS slicing allowed (`train[:5000]`). Rule: `train`.
    train_split: str | None = None
    # TFDS split to test on. Rule: `test`, or `validation` where there is none.
    test_split: str | None = None
    # Side of the square that images are stored and trained at, pixels. Rule: the data set's own;
    # a folder has none, so it must be set there.
    image_size: Annotated[int, FROM_1] = RULE
    # Part of a folder or npz that is held out as a test set where it brings none, in [0, 1). Rule:
    # 0.1 of images with labels; 0 without, as only labels can be tested on.
    holdout_fraction: Annotated[float, FROM_0_BELOW_1] = RULE
    # Mean and standard deviation of each channel, of pixels in [0, 1], three numbers each. Rule:
    # computed from the train split.
    mean: Annotated[tuple[float, ...], THREE, PIXELS] = RULE
    std: Annotated[tuple[float, ...], THREE, STDS] = RULE
    # A second data set, written as `dataset` is, whose training images are trained on too, each
    # client with an equal share of them. They are resized and normalised as the others are; labels
    # and test images are those of `dataset` alone. None: none.
    mix_dataset: Annotated[str | None, EXECUTION] = None
    # Part of the second data set's training images, in (0, 1], drawn at random.
    mix_fraction: Annotated[float, ABOVE_0_TO_1] = 1.0
    # Images of the second data set that a client adds to the B of each step. Rule: batch_size,
    # where mix_dataset is set.
    mix_batch_size: Annotated[int | None, FROM_1] = None

    # ------------------------------------------------------------------------------- clients
    # N, registered clients.
    num_clients: Annotated[int, FROM_1] = 100
    # Images of each client, drawn by it alone, so that clients share images: with this there may be
    # more clients than images. None: every image belongs to exactly one client.
    images_per_client: Annotated[int | None, FROM_1] = None
    # Non-IID by shards: classes that each client is dealt (paper: 2 on CIFAR-10, 20 on CIFAR-100).
    # None: IID, unless dirichlet_alpha is set.
    classes_per_client: Annotated[int | None, FROM_1] = None
    # Non-IID by Dirichlet proportions: concentration, > 0; small is more skewed. None: not used.
    dirichlet_alpha: Annotated[float | None, ABOVE_0] = None
    # C, clients drawn each round. Rule: all up to 100 clients, else 100 (paper, appendix).
    cohort_size: Annotated[int, FROM_1] = RULE
    # B, images a client a step; config.rich has clients that take more. Rule: total_batch // C, at
    # least 1, so that R does not exceed total_batch where it can.
    batch_size: Annotated[int, FROM_1] = RULE
    # R, server rows a step that the rule for batch_size aims at (paper: 100).
    total_batch: Annotated[int, FROM_1] = 100

    # ------------------------------------------------------------------------------ schedule
    # Passes over the data that the rule for rounds aims at (paper: 200).
    epochs: Annotated[int, FROM_1] = 200
    # E, passes of a client over its images in a round that the rule for steps_per_round aims at.
    local_epochs: Annotated[int, FROM_1] = 1
    # Steps in a round, the same for every client. Rule: E * images of a client // B, at least E; it
    # holds images_per_client, or the N-th part of all. With rich clients, E * images // (rows of a
    # step in which all N take part).
    steps_per_round: Annotated[int, FROM_1] = RULE
    # Rounds. Rule: epochs * N / (C * E), so that total work does not depend on the cohort; epochs *
    # images / (steps_per_round * C * B) where steps_per_round is set.
    rounds: Annotated[int, FROM_1] = RULE
    # Averagings of the client models a round, the last at its end. Rule: 1000 // (B * N), at least
    # 1 and at most steps_per_round (paper, appendix).
    syncs_per_round: Annotated[int, FROM_1, BY_METHOD] = RULE
    # What a client keeps between rounds. `persistent`: its optimizer state and, unless aligned, its
    # key encoder, as the public code does; memory grows with N. `stateless`: nothing, optimizer
    # state starts a round at zero; memory grows with C only; it requires align_momentum and a
    # shared queue, or local training that keeps nothing. Rule: `persistent`.
    client_state: Annotated[str, one_of(("persistent", "stateless")), BY_METHOD] = RULE
    # Weights of a sync: `equal`, or `size` for the number of a client's images.
    sync_weights: Annotated[str, one_of(("equal", "size"))] = "equal"

    # --------------------------------------------------------------------------------- model
    # `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet152`, `vgg11`, `vgg13`, `vgg16`,
    # `vgg19`, `mobilenetv2`.
    backbone: Annotated[str, one_of(BACKBONES)] = "resnet18"
    # Channels of the first unit, a multiple of 4, which those of all units grow with: stage s of a
    # ResNet or VGG has width * 2**s (the last of a VGG as many as the one before), and MobileNetV2
    # has the width multiplier width / 32. Rule: that of the published network, 64, or 32 in
    # MobileNetV2.
    width: Annotated[int, FROM_1] = RULE
    # Residual blocks of each stage, e.g. (1, 1, 1, 1) for a shallow member. Rule: the backbone's.
    # This field and `stem` stay unset with a backbone that does not read them.
    blocks_per_stage: Annotated[tuple[int, ...], STAGES] = RULE
    # First convolution: `3x3s1`, `3x3s2`, `7x7s2` (kernel and stride). Rule, by image_size: 3x3s2
    # at 64, 7x7s2 from 128 on, else 3x3s1.
    stem: Annotated[str, one_of(STEMS)] = RULE
    # Units on the client, 1 (the stem; MocoSFL-1) to all of them; 2 is the paper's MocoSFL-3. A
    # unit is a residual block of a ResNet or MobileNetV2, or a convolution or pooling of a VGG.
    # Rule: 1.
    cut: Annotated[int, BY_METHOD] = RULE
    # Pair of convolutions that narrows the transmitted latents: `C{channels}S{stride}` with stride
    # 1, 2 or 4, or `none`. Rule: `none`.
    bottleneck: Annotated[str, BY_METHOD] = RULE
    # Projection head: `V1`, `smallV2`, `V2`, `largeV2`.
    head: Annotated[str, one_of(HEADS)] = "V2"
    # D, width of the embedding. Rule: 128, 512, 1024, 2048 for the four heads.
    head_width: Annotated[int, FROM_1] = RULE
    # `float32`, or `bfloat16` for computing on GPU and TPU; parameters are float32 either way.
    compute_dtype: Annotated[str, one_of(("float32", "bfloat16"))] = "float32"

    # -------------------------------------------------------------------------- contrastive loss
    # `one_way`, `server` (the public code: the swapped direction trains the server only) or
    # `client` (MonAcoSFL: both views through both client models). Rule: `one_way` for head V1, else
    # `server`.
    loss: Annotated[str, one_of(LOSSES), BY_METHOD] = RULE
    # True: one queue shared by all clients. False: private queues, queue_length // N rows each.
    # Rule: True.
    feature_sharing: Annotated[bool, BY_METHOD] = RULE
    # K, rows of the queue, or of all private queues together; of each client's own in local
    # training. Rule: 6000.
    queue_length: Annotated[int, FROM_1, BY_METHOD] = RULE
    # T, divides cosine similarities. Rule: 0.1; 0.07 for SimCLR.
    temperature: Annotated[float, TEMPERATURE, BY_METHOD] = RULE
    # Decay of key encoders, of clients and server, and of target networks, in [0, 1). Rule: 0.99.
    ema: Annotated[float, FROM_0_BELOW_1, BY_METHOD] = RULE
    # Whether a sync averages the clients' key encoders too (MonAcoSFL; matters at deep cuts).
    # Rule: False.
    align_momentum: Annotated[bool, BY_METHOD] = RULE

    # -------------------------------------------------------------------------------------- start
    # Trained network to start from, in place of random parameters: a run's folder, or an encoder
    # file. A run that has begun resumes without it. None: random parameters.
    init_from: Annotated[str | None, EXECUTION] = None
    # What is taken of it: `client`, `server` (with the head) or `both`; key encoders start alike.
    init_parts: Annotated[str, one_of(("client", "server", "both"))] = "both"
    # Digest of its weights; others are refused. Rule: that of the file, where init_from is set.
    init_digest: str | None = None

    # ------------------------------------------------------------------------------ optimisation
    # Learning rate of SGD at the start; that of the server where clients have their own.
    learning_rate: Annotated[float, AT_LEAST_0] = 0.06
    # That of the clients; 0 freezes the client models. Rule: learning_rate.
    client_learning_rate: Annotated[float, AT_LEAST_0, BY_METHOD] = RULE
    # Both rates over the run: `cosine` to 0, `step` (x0.1 at 60 % and 80 %) or `constant`.
    # Rule: `step` for head V1, else `cosine`.
    schedule: Annotated[str, one_of(SCHEDULES)] = RULE
    # SGD momentum (no Nesterov).
    momentum: Annotated[float, FROM_0_BELOW_1] = 0.9
    # Weight decay, on every parameter.
    weight_decay: Annotated[float, AT_LEAST_0] = 5e-4

    # ------------------------------------------------------------------------------ augmentation
    # `v2` (MoCo v2) or `v1` (the same without blur). Rule: `v1` for head V1, else `v2`.
    augmentation: Annotated[str, one_of(("v1", "v2"))] = RULE
    # Smallest part of an image's area that a crop keeps, in (0, 1].
    crop_min_scale: Annotated[float, ABOVE_0_TO_1] = 0.08
    # Side of the blur kernel, odd, pixels. Rule: a tenth of image_size, at least 9 (two standard
    # deviations of the widest blur to each side).
    blur_kernel_size: Annotated[int, FROM_1, ODD] = RULE

    # -------------------------------------------------------------------------------- evaluation
    # Rounds between kNN monitors; 0 leaves only those at start and end. Rule: a tenth of the run.
    knn_every: Annotated[int, FROM_0, EXECUTION] = RULE
    # Neighbours of the kNN monitor (at most the size of the train split).
    knn_k: Annotated[int, FROM_1] = 200
    # Temperature of its weights exp(similarity / temperature).
    knn_temperature: Annotated[float, at_least(0.02, "float32 overflows")] = 0.1
    # Epochs of the linear probe at the end, and of the semi-supervised ones; 0 skips them.
    probe_epochs: Annotated[int, FROM_0] = 100
    # Their batch size and Adam rate.
    probe_batch_size: Annotated[int, FROM_1] = 128
    probe_learning_rate: Annotated[float, ABOVE_0] = 1e-3
    # Whether the end also has semi-supervised probes, on 10 % and on 1 % of the labels. A run that
    # is complete gets them from `mocosfl_jax.evaluate`.
    semi_supervised: Annotated[bool, EXECUTION] = False

    # --------------------------------------------------------------------------------------- run
    # Everything random derives from it; from 0 to 2**32 - 1.
    seed: Annotated[int, AT_LEAST_0, SEED] = 0
    # Devices of the run, the first so many; clients are spread over them. Those of a CPU are
    # virtual, at most one a core. None: all; on a CPU two, if they share the cohort evenly, or as
    # many as XLA_FLAGS or JAX_NUM_CPU_DEVICES say; a run that goes on keeps those it started with.
    devices: Annotated[int | None, FROM_1, EXECUTION] = None
    # Devices that share one copy of the server's parameters, a divisor of their number.
    server_shards: Annotated[int, FROM_1, EXECUTION] = 1
    # Chunks of a device's cohort that a step runs one after the other, with summed gradients, where
    # the activations of all at once exceed the device; 1 with MocoSFL and head largeV2 (BatchNorm
    # sees all rows). None: 1; on a CPU chunks that stay in its cache, 10 images of the paper's
    # network, or one client in local training.
    cohort_chunks: Annotated[int | None, FROM_1, BY_METHOD, EXECUTION] = None
    # Folder of compiled programs, which later runs reuse; `none` for none. The environment variable
    # JAX_COMPILATION_CACHE_DIR takes precedence over it.
    compilation_cache: Annotated[str, EXECUTION] = "~/.cache/mocosfl_jax"
    # Steps compiled into one dispatch; divides steps_per_round. Rule: its largest divisor up to 10.
    steps_per_dispatch: Annotated[int, FROM_1, EXECUTION] = RULE
    # Rounds between checkpoints. Rule: a twentieth of the run.
    checkpoint_every: Annotated[int, FROM_1, EXECUTION] = RULE
    # Checkpoints that are kept, the latest ones.
    keep_checkpoints: Annotated[int, FROM_1, EXECUTION] = 2
    # Images encoded at once in evaluation.
    eval_batch_size: Annotated[int, FROM_1, EXECUTION] = 200
    # Whether TensorBoard files are written beside metrics.jsonl.
    tensorboard: Annotated[bool, EXECUTION] = True
    # Whether a progress bar is drawn; it also needs a terminal.
    progress: Annotated[bool, EXECUTION] = True

    # ------------------------------------------------------------------------------ sections
    # Fields that one method alone reads, by the name of their section: `config.NAME.FIELD`. A
    # section is a frozen dataclass of the method's `Recipe`, which documents its fields.
    sections: Mapping[str, Any] = FrozenDict()

    def section(self, kind: type[Section]) -> Section:
        """The section of this type.

        Raises: KeyError: the method has no such section.
        """
        for section in self.sections.values():
            if isinstance(section, kind):
                return section
        raise KeyError(kind.__name__)

    def section_or_default(self, kind: type[Section]) -> Section:
        """The section of this type; one of defaults where the method has none."""
        found = (section for section in self.sections.values() if isinstance(section, kind))
        return next(found, kind())


@dataclass(frozen=True)
class Resolved(Config):
    """A config whose fields are filled and checked together; made by `resolve`.

    Still None may be: fields whose type says so, fields that the method or the backbone does not
    read, and mean and std until the images have been read.
    """

    @classmethod
    def of(cls, config: Config) -> "Resolved":
        """The same values. Args: config: filled and checked."""
        return cls(**vars(config))

    @property
    def total_steps(self) -> int:
        return self.rounds * self.steps_per_round

    @property
    def images_a_step(self) -> int:
        """Images of one client in a step, those of a second data set among them; a rich client
        (`config.rich`) takes a multiple."""
        return self.batch_size + (self.mix_batch_size or 0)

    @property
    def sync_steps(self) -> tuple[bool, ...]:
        """Which steps of a round end with a sync: evenly spread, the last one among them.

        A method that does not read `syncs_per_round` has one sync a round.
        """
        steps, syncs = self.steps_per_round, self.syncs_per_round or 1
        return tuple((s + 1) * syncs // steps > s * syncs // steps for s in range(steps))


EXECUTION_FIELDS = marked(Config, EXECUTION)
"""Names of the fields that say only how a run is carried out: it may be resumed with others."""

METHOD_FIELDS = marked(Config, BY_METHOD)
"""Names of the fields that not every method reads."""
