"""What a training takes on n GPUs, from the speed of one of them: arithmetic only, see FORMULAS."""

from dataclasses import dataclass

from torch import nn

from contextual_cnn.batch_plan import BatchPlan, NormPlan
from contextual_cnn.errors import UserError

FORMULAS = """\
  n GPUs share each step's global batch of B images, b = B/n each, in micro-batches of m = min(b, --micro-batch)
  compute      max(b / s, b/m * floor)    s: images/s of one GPU by itself; floor: --floor-ms, the time of a micro-batch
                                          of a few images, which is that of launching its kernels
  all-reduce   2 (n-1)/n * G / w          ring; G: gradient bytes; w: --intra inside one node, else the smaller of
                                          --intra and --inter
  hidden       min(o * all-reduce, 2/3 * m/s)   o: --overlap, but no more than the backward pass of the last
                                          micro-batch, which is when gradients travel
  checkpoint   what a copy of the state to the host takes of a step: 16 bytes a parameter at --copy, once an epoch,
               and no more than 2 % of the time (other epochs are then not saved)
  step         compute + all-reduce - hidden + checkpoint
  efficiency   (b / s) / step
  norm         images in a statistic of the batch norms: 128, of several GPUs where b is smaller
  days         epochs * floor(images / B) * step / 86400
  cost         days * 24 * n * price
  storage      B / step * bytes per image, over all nodes, if nothing is cached
Not in it: latency (a ring of n GPUs passes 2 (n-1) hops, which counts beyond some hundred GPUs), slow nodes,
evaluations, restarts. Read it as the best case."""

_BUDGET = 0.02  # of the time, for checkpoints (see runs/checkpoint_store.py)
_NORM_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is to be computed; sizes in images and bytes."""

    images: int
    epochs: int
    global_batch: int
    micro_batch: int
    bytes_per_image: float
    gradient_bytes: int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """On what. Speeds: images/s of one GPU, bytes/s of the links.

    intra_node, inter_node: bus bandwidth of an all-reduce, as nccl-tests print it (busbw).
    overlap: the share of the all-reduce that would be hidden behind a backward pass long enough, 0..1.
    floor: seconds that a micro-batch takes however small it is. copy: bytes/s from a GPU to its host.
    price: of one GPU for an hour.
    """

    images_per_second: float
    gpus_per_node: int
    intra_node: float
    inter_node: float
    overlap: float
    floor: float
    copy: float
    price: float

    def __post_init__(self) -> None:
        for name in ("images_per_second", "gpus_per_node", "intra_node", "inter_node"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}", f"a positive {name}")
        if not (self.floor >= 0 and self.copy > 0):
            raise UserError(f"floor {self.floor} s, copy {self.copy} bytes/s", "--floor-ms 12 --copy 10")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"overlap is a share between 0 and 1, got {self.overlap}", "--overlap 0.5")


@dataclass(frozen=True)
class Estimate:
    """Times of a step in seconds, storage in bytes/s, cost in units of the price."""

    gpus: int
    nodes: int
    images_per_gpu: int
    norm_images: int
    compute: float
    all_reduce: float
    checkpoint: float
    step: float
    efficiency: float
    days: float
    cost: float
    storage: float


def estimate(gpus: int, training: Training, cluster: Cluster) -> Estimate:
    """One row of the plan.

    Raises:
        UserError: the global batch cannot be shared by so many.
    """
    _check_share(gpus, training.global_batch)
    share = training.global_batch // gpus
    ideal, micro_batch = share / cluster.images_per_second, min(share, training.micro_batch)
    compute = max(ideal, share / micro_batch * cluster.floor)
    all_reduce = ring_all_reduce(gpus, training.gradient_bytes, _bandwidth(gpus, cluster))
    backward = 2 / 3 * compute * micro_batch / share
    step = compute + all_reduce - min(cluster.overlap * all_reduce, backward)
    steps_per_epoch = training.images // training.global_batch
    checkpoint = min(4 * training.gradient_bytes / cluster.copy / steps_per_epoch, _BUDGET * step)
    step += checkpoint
    days = training.epochs * steps_per_epoch * step / 86400
    return Estimate(
        gpus=gpus,
        nodes=-(-gpus // cluster.gpus_per_node),
        images_per_gpu=share,
        norm_images=_norm_images(training, gpus, micro_batch),
        compute=compute,
        all_reduce=all_reduce,
        checkpoint=checkpoint,
        step=step,
        efficiency=ideal / step,
        days=days,
        cost=days * 24 * gpus * cluster.price,
        storage=training.global_batch / step * training.bytes_per_image,
    )


def _norm_images(training: Training, gpus: int, micro_batch: int) -> int:
    accumulation = training.global_batch // gpus // micro_batch
    plan = BatchPlan(training.images, training.global_batch, micro_batch, accumulation, gpus)
    return NormPlan.make(plan, _NORM_BATCH).images


def ring_all_reduce(gpus: int, size: float, bandwidth: float) -> float:
    """Seconds: each of n GPUs sends 2 (n - 1) parts of size / n."""
    return 2 * (gpus - 1) / gpus * size / bandwidth


def possible_counts(global_batch: int, largest: int = 1024) -> list[int]:
    """1, 2, 4 .. as far as they share the batch evenly."""
    return [2**i for i in range(largest.bit_length()) if 2**i <= largest and global_batch % 2**i == 0]


def gradient_bytes(model: nn.Module) -> int:
    """What crosses the ranks in a step: float32 gradients, as the weights are."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _bandwidth(gpus: int, cluster: Cluster) -> float:
    """Of the slowest link in the ring."""
    if gpus <= cluster.gpus_per_node:
        return cluster.intra_node
    return min(cluster.intra_node, cluster.inter_node)


def _check_share(gpus: int, global_batch: int) -> None:
    if gpus < 1 or global_batch < 1:
        raise UserError(f"{gpus} GPUs and a global batch of {global_batch}", "both are 1 or more")
    if gpus > global_batch:
        raise UserError(
            f"{gpus} GPUs for steps of {global_batch} images: some would have none",
            f"at most {global_batch} GPUs, or a larger --global-batch (another recipe, with another learning rate)",
        )
    if global_batch % gpus:
        fewer = next(n for n in range(gpus, 0, -1) if global_batch % n == 0)
        raise UserError(f"a global batch of {global_batch} is not shared evenly by {gpus} GPUs", f"--gpus {fewer}")
