"""The training loop, and only the loop."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from slotscops import checkpoint, console
from slotscops.build import build_model, build_optimizer, parameter_names
from slotscops.clusters import find_centres, sample_vectors
from slotscops.config import Config, to_mapping
from slotscops.errors import RunError
from slotscops.evaluate import evaluate_split, picture_of_split
from slotscops.loader import Split, training_batches
from slotscops.objective import check_objective, compute_terms, weighted_sum
from slotscops.plan import TrainingPlan, batch_digest
from slotscops.records import Batch
from slotscops.run_folder import RunFolder, check_same_run
from slotscops.schedule import learning_rate_factor
from slotscops.startup import open_training_data, start_accelerator
from slotscops.stopwatch import Stopwatch, peak_memory_bytes

_REHEARSED_STEPS = 3  # the first is slower than the rest


def fit(config: Config, resume: str = "auto", dry_run: bool = False) -> None:
    """Trains to `train.total_steps`; a dry run takes a few steps, writes nothing and says what all of it would cost.

    Args:
        resume: `auto` goes on from the run's newest whole checkpoint, `none` refuses where there is one, anything
            else is the path of a run or checkpoint to go on from.

    Raises:
        UserError: settings, data, features or checkpoint that do not fit each other.
        RunError: a loss or gradient that is not finite.
    """
    accelerator = start_accelerator(config)
    try:
        start_from = None if dry_run else RunFolder.of(config).find_checkpoint(resume)
        trainer = Trainer(config, accelerator, is_fresh=start_from is None)
        if dry_run:
            trainer.rehearse()
            return
        if start_from is not None:
            trainer.resume(start_from)
        trainer.train()
    finally:
        accelerator.end_training()


class Trainer:
    """One process of a run: network, optimizer, data, and how far it came."""

    def __init__(self, config: Config, accelerator: Accelerator, is_fresh: bool = True) -> None:
        """
        Args:
            is_fresh: False where a checkpoint follows, whose basis need not be looked for.
        """
        self.config = config
        self.accelerator = accelerator
        self.folder = RunFolder.of(config)
        check_objective(config, accelerator.num_processes)
        self.dataset, self.cache = open_training_data(config)
        self.network = build_model(config, self.cache.shape[0])
        # Only the object masks are looked at, and only where the target is masked by them.
        needs_masks = config.losses.target_mask == "object"
        self._split = Split(self.dataset, "train", self.cache, with_labels=needs_masks)
        if is_fresh:
            self._start_from_features()
        if config.train.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config, self.network)
        # The bare network and optimizer stay at hand: what is saved bears no trace of DDP or torch.compile.
        model = torch.compile(self.network) if config.train.compile else self.network
        self._model, self._stepper = accelerator.prepare(model, self.optimizer)
        self.step = 0  # steps done
        self.samples_seen = 0
        self._scores: dict[str, float] = {}  # of the last evaluation
        self._terms: dict[str, Tensor] = {}  # of the last step, unweighted, this process's mean
        self._first_bad_step = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.stopwatch = Stopwatch()
        # Shared-Gaussian slots draw from this: differently on each process, the same at each start.
        torch.manual_seed(config.seed * 1000 + accelerator.process_index)

    def _start_from_features(self) -> None:
        """The target's scales and the basis, in the target's space, from a sample of the cache."""
        if self.config.basis.init != "kmeans" and self.config.teacher.transform != "channel_standardised":
            return
        vectors = sample_vectors(self._split, self.config.seed)
        self.network.target.measure(vectors)
        if self.config.basis.init == "kmeans":
            vectors = self.network.target(vectors)
            centres = find_centres(vectors, self.config.slots.num_parts, self.config.seed)
            self.network.basis_parameter.data.copy_(centres)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """From where the run stands to its end, or to `train.stop_after_steps` from here."""
        train = self.config.train
        start, last = self.step, train.total_steps
        if train.stop_after_steps is not None:
            last = min(last, start + train.stop_after_steps)
        self.open_run()
        batches = self.open_batches(last - start)
        self.stopwatch.restart()
        for _ in console.track_silently(range(start, last), last - start, "training steps"):
            loss, grad_norm = self.take_step(batches)
            ends = self.step == last
            with self.stopwatch.paused():
                if train.eval_every_steps and (self.step % train.eval_every_steps == 0 or ends):
                    self._evaluate()
            if self.step % train.log_every_steps == 0 or ends or self.step == 1 or self._was_evaluated_now():
                self.log(loss, grad_norm)
            with self.stopwatch.paused():
                if self.step % train.save_every_steps == 0 or ends:
                    self._save()
        self._say_how_it_ended()

    def take_step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One update from one global batch. Returns this process's mean loss and the norm of the whole gradient."""
        train = self.config.train
        factor = learning_rate_factor(self.step, train.total_steps, train.schedule, train.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * factor
        total = torch.zeros((), device=self.accelerator.device)
        self._terms = {}
        for number in range(train.accumulation_steps):
            with self.stopwatch.waiting():
                batch = next(batches).to(self.accelerator.device)
            is_last = number == train.accumulation_steps - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self._model):
                loss = self._loss(batch) / train.accumulation_steps
                self.accelerator.backward(loss)
            total += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), train.clip_norm or float("inf"))
        self._stepper.step()
        self._stepper.zero_grad()
        self.step += 1
        self.samples_seen += train.batch_size
        self.stopwatch.count(train.batch_size)
        self._note_if_bad(total, grad_norm)
        return total, grad_norm

    def _loss(self, batch: Batch) -> Tensor:
        terms = compute_terms(self._model, self.network.target, batch, self.config, self.step)
        share = 1 / self.config.train.accumulation_steps
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0) + share * term.detach()
        return weighted_sum(terms, self.config.losses)

    def _note_if_bad(self, loss: Tensor, grad_norm: Tensor) -> None:
        # On the device: looking at the number here would make every step wait for it.
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm)) & (self._first_bad_step == 0)
        self._first_bad_step = torch.where(is_bad, self.step, self._first_bad_step)

    def _check_finite(self) -> None:
        step = int(self._first_bad_step)
        if step:
            raise RunError(
                f"step {step}: the loss or its gradient is not finite; lower train.learning_rate or train.clip_norm "
                f"and go on from the last checkpoint, which is from before it: {self.folder.checkpoints}"
            )

    def open_batches(self, num_steps: int) -> Iterator[Batch]:
        """This process's microbatches of the next so many steps."""
        on_gpu = self.accelerator.device.type == "cuda"
        return training_batches(self._split, self._plan(num_steps), self.config.data.num_workers, pin_memory=on_gpu)

    def _plan(self, num_steps: int) -> TrainingPlan:
        return TrainingPlan(
            num_samples=len(self._split),
            seed=self.config.seed,
            batch_size=self.config.train.batch_size,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            accumulation_steps=self.config.train.accumulation_steps,
            samples_seen=self.samples_seen,
            last=self.samples_seen + num_steps * self.config.train.batch_size,
        )

    # ---- where it starts -----------------------------------------------------------------------------------------

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint, exactly."""
        saved = checkpoint.load_checkpoint(path)
        check_same_run(saved.state, self.config, self.dataset, self.cache, path)
        checkpoint.restore_model(self.network, saved.model, path)
        checkpoint.restore_optimizer(self.optimizer, parameter_names(self.network), saved.optimizer)
        checkpoint.restore_rng(saved.rng, self.accelerator.process_index)
        self.step, self.samples_seen = saved.state.step, saved.state.samples_seen
        self._scores = saved.state.scores
        console.say(f"{path}: going on from step {self.step}")

    def open_run(self) -> None:
        """Makes the run's folder and opens the trackers."""
        if self.accelerator.is_main_process:
            self.folder.open(self.config, self.step)
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})

    def rehearse(self) -> None:
        """Takes a few steps, writes nothing, says what the whole run would cost."""
        batches = self.open_batches(_REHEARSED_STEPS)
        for _ in range(_REHEARSED_STEPS):
            start = time.perf_counter()
            loss, _ = self.take_step(batches)
            loss_value = loss.item()
            step_s = time.perf_counter() - start
        self._check_finite()
        train = self.config.train
        weights_mb = sum(parameter.nbytes for parameter in self.network.parameters()) / 1e6
        console.say(
            f"dry run: loss {loss_value:.5g}, {step_s:.3f} s a step of {train.batch_size} images, so about "
            f"{train.total_steps * step_s / 3600:.2f} h for {train.total_steps} steps on "
            f"{self.accelerator.num_processes} process(es) of {self.accelerator.device.type}; "
            f"peak memory {peak_memory_bytes(self.accelerator.device) / 1e9:.2f} GB, "
            f"{weights_mb:.0f} MB of weights. Nothing was written."
        )

    # ---- what it writes ------------------------------------------------------------------------------------------

    def log(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Writes down the step just taken: metrics.jsonl, TensorBoard, a line."""
        row = self._make_row(loss, grad_norm)
        if self._was_evaluated_now():
            row |= {name: score for name, score in self._scores.items() if name.startswith("val_")}
        digest = row.pop("batch_digest")  # text, which TensorBoard cannot plot
        self.accelerator.log(row, step=self.step)
        if self.accelerator.is_main_process:
            self.folder.log(row | {"batch_digest": digest})
            console.say_plainly(
                f"step {self.step}/{self.config.train.total_steps}  loss {row['loss']:.6g}  "
                f"{row['images_per_second']:.1f} images/s  data wait {100 * row['data_wait']:.1f} %"
                + "".join(f"  {name} {100 * row[name]:.1f}" for name in ("val_nmi", "val_ari") if name in row)
            )
        self.stopwatch.restart()

    def _make_row(self, loss: Tensor, grad_norm: Tensor) -> dict[str, Any]:
        """What is written down of the step just taken. The only place where a step waits for the device."""
        loss = self.accelerator.reduce(loss, "mean")
        terms = {name: self.accelerator.reduce(term, "mean") for name, term in self._terms.items()}
        self._check_finite()
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "loss": loss.item(),
            **{f"loss_{name}": term.item() for name, term in terms.items()},
            **{f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups},
            "grad_norm": grad_norm.item(),
            **self.stopwatch.read(),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "batch_digest": self._batch_digest(),
        }

    def _batch_digest(self) -> str:
        """Hash of the keys of the global batch just trained on, in order."""
        samples = self._plan(0).global_batch(self.samples_seen - self.config.train.batch_size)
        return batch_digest(self._split.key(sample) for sample in samples)

    def _evaluate(self) -> None:
        if not self.dataset.num_samples("val"):
            return
        split = Split(self.dataset, "val", self.cache, with_labels=True)
        scores = evaluate_split(self.network, split, self.accelerator, limit=self.config.train.eval_images)
        self._scores = {"step": self.step} | {f"val_{name}": score for name, score in scores.pooled().items()}
        if self.accelerator.is_main_process:
            picture_of_split(self.network, split).save(self.folder.pictures / f"step-{self.step}.png")

    def _was_evaluated_now(self) -> bool:
        return self._scores.get("step") == self.step

    def _save(self) -> None:
        self._check_finite()
        generators: dict[str, Tensor] = {}
        for states in gather_object([checkpoint.rng_tensors(self.accelerator.process_index)]):
            generators |= states
        if self.accelerator.is_main_process:
            state = checkpoint.State(
                step=self.step,
                samples_seen=self.samples_seen,
                config=to_mapping(self.config),
                shard_digest=self.dataset.digest,
                feature_digest=self.cache.digest,
                teacher_weights=self.cache.manifest["weights"],
                teacher_sha256=self.cache.manifest["weights_sha256"],
                scores=self._scores,
            )
            optimizer = checkpoint.optimizer_tensors(self.optimizer, parameter_names(self.network))
            checkpoint.save_checkpoint(
                self.folder.checkpoints,
                self.network.state_dict(),
                optimizer,
                generators,
                state,
                keep=self.config.train.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _say_how_it_ended(self) -> None:
        if self.step < self.config.train.total_steps:
            console.say(f"{self.folder.path}: stopped at step {self.step}; start again to go on")
            return
        console.say(
            f"{self.folder.path}: trained {self.step} steps; score it with: python -m slotscops.evaluate "
            f"--checkpoint {self.folder.path} --shards {self.config.data.shards}"
        )
