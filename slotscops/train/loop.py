"""The training loop, and only the loop."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from slotscops.config import Config, to_mapping
from slotscops.core import console
from slotscops.core.errors import SilentLoaderError
from slotscops.core.files import write_bytes, write_json
from slotscops.core.machine import machine
from slotscops.core.pictures import picture_bytes
from slotscops.core.records import Batch
from slotscops.loader.batches import move_ahead, training_batches
from slotscops.loader.plan import ORDER, TrainingPlan, batch_digest
from slotscops.loader.shared_memory import check_shared_memory
from slotscops.loader.split import Split
from slotscops.losses.objective import check_objective, compute_terms, weighted_sum
from slotscops.metrics.scoring import evaluate_split, picture_of_split
from slotscops.model.basis import needs_features, start_from_features
from slotscops.train import monitors
from slotscops.train.averaging import WeightAverage
from slotscops.train.build import build_model, build_optimizer
from slotscops.train.damage import DamageLedger
from slotscops.train.garbage import SynchronisedGarbage
from slotscops.train.processes import (
    check_object_masks,
    check_same_on_all_ranks,
    microbatches_of_process,
    on_first_process,
    open_training_data,
    timeout_of,
    weigh_layers,
)
from slotscops.train.reduction import FixedOrderReducer, seed_microbatch, take_first_process_tensors
from slotscops.train.run import checkpoint
from slotscops.train.run.folder import RunFolder, check_same_run
from slotscops.train.run.page import write_page
from slotscops.train.run.side_files import SideFiles
from slotscops.train.run.writer import CheckpointWriter
from slotscops.train.schedule import learning_rate_factor
from slotscops.train.stopping import Agreement, StopRequest
from slotscops.train.stopwatch import Stopwatch, peak_memory_bytes
from slotscops.train.trackers import log_numbers, log_picture, open_trackers

_WAITING_PICTURES = 50  # pictures that wait while the disk is full; beyond it the oldest are dropped
_NO_TRUTH = (
    "No scores and no best checkpoint: the evaluated photos of val have no true parts to compare with. "
    "To get scores, make shards of photos with part labels."
)


class Trainer:
    """One process of a run: its network, optimizer and data, and the number of steps done."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        start_from: checkpoint.Checkpoint | None = None,
        only: NDArray[np.int64] | None = None,
    ) -> None:
        """
        Args:
            start_from: the checkpoint to continue from; None starts a new run.
            only: (n,) the samples of the training split to train on; None takes all.
        """
        self.config = config
        self.accelerator = accelerator
        self.folder = RunFolder.of(config)
        self._num_microbatches = microbatches_of_process(config, accelerator.num_processes)
        check_objective(config, accelerator.num_processes, self._num_microbatches)
        self.dataset, self.cache = open_training_data(config)
        check_same_on_all_ranks(config, self.dataset, self.cache)
        # Part labels are never read. Object masks are read only if the target is masked by them.
        needs_masks = config.losses.target_mask == "object"
        self.split = Split(
            self.dataset, "train", self.cache, False, replace_damaged=True, with_object_masks=needs_masks, only=only
        )
        microbatch = config.train.batch_size // accelerator.num_processes // self._num_microbatches
        check_shared_memory(self.split, microbatch, config.data.num_workers)
        self.files = SideFiles()
        self._noted_missing: dict[str, str] = {}  # what status.json says, or was meant to say
        self.damage = DamageLedger(self.dataset, "train", config.data.max_damaged_share, self.folder, self.files)
        self.candidates: dict[str, Any] = {}  # see `train.candidates`; empty if there was nothing to choose
        self._starts: dict[int, list[dict[str, Tensor]]] = {}  # by seed: the tensors of basis and target
        self.stopwatch = Stopwatch()
        self.begin(config.seed, start_from)

    def begin(self, start_seed: int, start_from: checkpoint.Checkpoint | None = None, compiled: bool = True) -> None:
        """Builds network and optimizer for step 0, or for the step of a checkpoint. What was trained before is dropped.

        Args:
            start_seed: seed of the clusters that the basis starts from. All else follows `config.seed`.
            compiled: False leaves the network uncompiled whatever `train.compile` says.
        """
        config = self.config
        num_classes = len(self.dataset.class_names)
        projection = self.cache.projection if config.encoder.name == "features" else None
        self.network = build_model(config, self.cache.shape[0], start_from is None, num_classes, projection)
        if start_from is None:
            weigh_layers(self.network.target, config)
            self._start_from_features(start_seed)
        if config.train.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config, self.network)
        self._wrap(compiled and config.train.compile)
        self.step = 0  # steps done
        self.samples_seen = 0
        self._scores: dict[str, float] = {}  # of the last evaluation; empty if val has no true parts
        self._slot_pixels: dict[str, list[int]] = {}  # of the last evaluation: by class, of each slot
        self._evaluated_step = 0  # the step of the last evaluation in this start
        self._best: dict[str, Any] = {}  # score, value and step of the best one
        self.finite = monitors.FiniteWatch(self.accelerator)
        self._terms: dict[str, Tensor] = {}  # of the last step, unweighted, this process's mean
        self._watched: tuple[Tensor, Tensor] | None = None  # logits and basis of the last microbatch
        self._warned: set[str] = set()  # causes of collapse that were already reported
        # Shared-Gaussian slots draw from this generator. Its seed differs between processes but not between starts.
        # With train.reduction=deterministic, each microbatch seeds it anew.
        torch.manual_seed(config.seed * 1000 + self.accelerator.process_index)
        if start_from is not None:
            self._resume(start_from)

    def _start_from_features(self, seed: int) -> None:
        """Initialises basis and target: one process reads the sample and clusters it, the others take its result."""
        if not needs_features(self.config):
            return
        basis, target, guess = self.network.basis, self.network.target, self.network.object_guess
        parts = [part for part in (basis, target, guess) if part is not None]

        def start() -> list[dict[str, Tensor]]:
            if self.split.with_object_masks:
                check_object_masks(self.split)
            start_from_features(basis, target, self.split, self._config_of_start(seed), guess)
            return [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]

        if seed not in self._starts:
            self._starts[seed] = on_first_process(start, timeout_of(self.config))
        for part, state in zip(parts, self._starts[seed], strict=True):
            part.load_state_dict(state)

    def _config_of_start(self, seed: int) -> Config:
        """The settings of a start. Others than the run's own are single starts of k-means.

        The best of ten starts, which `kmeans` takes, is nearly the same for every seed.
        """
        if seed == self.config.seed:
            return self.config
        return replace(self.config, seed=seed, basis=replace(self.config.basis, init="single_kmeans"))

    def _wrap(self, compiled: bool) -> None:
        """Sets up DDP or fixed-order summing, mixed precision, compilation and weight averaging."""
        train = self.config.train
        # The unwrapped network and optimizer are kept, so that checkpoints do not depend on DDP or torch.compile.
        model = torch.compile(self.network) if compiled else self.network
        self._reducer: FixedOrderReducer | None = None
        if train.reduction == "deterministic":
            self._model = self.accelerator.prepare_model(model, evaluation_mode=True)  # without DDP
            take_first_process_tensors(self.network)
            self._reducer = FixedOrderReducer(list(self.network.parameters()))
        else:
            self._model = self.accelerator.prepare_model(model)
        self._stepper = self.accelerator.prepare_optimizer(self.optimizer)
        self._average = WeightAverage(self.network, train.ema_decay) if train.ema_decay else None

    # ---- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Trains from the current step to the end of the run, or for `train.stop_after_steps` steps.

        Returns:
            The number of the signal that stopped the run early, or 0.
        """
        train = self.config.train
        start, last = self.step, train.total_steps
        if train.stop_after_steps is not None:
            last = min(last, start + train.stop_after_steps)
        self.open_run()
        batches = self.open_batches(last - start)
        agreement = Agreement(timeout_of(self.config))
        signal_number = 0
        with (
            StopRequest() as request,
            CheckpointWriter(self.folder.checkpoints, train.keep_checkpoints) as writer,
            SynchronisedGarbage() as garbage,
        ):
            self.stopwatch.restart()
            for _ in console.track_silently(range(start, last), last - start, "training steps"):
                with self._saved_if_no_batch_comes(writer):
                    loss, grad_norm = self.take_step(batches)
                signal_number = agreement.exchange(request.signal_number)
                ends = self.step == last or signal_number > 0
                with self.stopwatch.paused():
                    if train.eval_every_steps and not signal_number and (self._is_due(train.eval_every_steps) or ends):
                        self._evaluate(request)
                if self._is_due(train.log_every_steps) or ends or self.step == 1 or self._was_evaluated_now():
                    self.log(loss, grad_norm)
                with self.stopwatch.paused():
                    if self._was_evaluated_now() and self.accelerator.is_main_process:
                        self._write_page()
                    if self._is_due(train.save_every_steps) or ends or self._best.get("step") == self.step:
                        self.save(writer)
                    garbage.collect_if_due(self.step)
                if signal_number:
                    break
            agreement.finish()
        if self.accelerator.is_main_process:
            self.files.catch_up()
            self.folder.close(self.config, self.step, signal_number, self.files)
            self._write_page()
        return signal_number

    @contextmanager
    def _saved_if_no_batch_comes(self, writer: CheckpointWriter) -> Iterator[None]:
        """Saves the last step if the loader falls silent after it. Of several processes the others cannot answer."""
        try:
            yield
        except SilentLoaderError:
            if self.step and self.accelerator.num_processes == 1 and not self._terms:
                self.save(writer)
            raise

    def _is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0

    def take_step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One update from one global batch. Returns this process's mean loss and the norm of the whole gradient."""
        train = self.config.train
        factor = learning_rate_factor(self.step, train.total_steps, train.schedule, train.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * factor
        total = torch.zeros((), device=self.accelerator.device)
        self._terms = {}
        for number in range(self._num_microbatches):
            with self.stopwatch.waiting():
                batch = next(batches)
            self.damage.note(batch.damaged)
            if self._reducer:
                first = self.accelerator.process_index * self._num_microbatches
                seed_microbatch(self.config.seed, self.step, first + number)
            is_last = number == self._num_microbatches - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self._model):
                loss = self._loss(batch)
                self.accelerator.backward(loss if self._reducer else loss / self._num_microbatches)
            if self._reducer:
                self._reducer.collect()
            total += loss.detach() / self._num_microbatches
        if self._reducer:
            self._reducer.reduce()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), train.clip_norm or float("inf"))
        self._stepper.step()
        self._stepper.zero_grad()
        if self._average:
            self._average.update()
        self.step += 1
        self.samples_seen += train.batch_size
        self.stopwatch.count(train.batch_size)
        self.finite.note(self.step, total, grad_norm)
        return total, grad_norm

    def _loss(self, batch: Batch) -> Tensor:
        output, terms = compute_terms(
            self._model, self.network.target, batch, self.config, self.step, self.network.object_guess
        )
        self._watched = (output.logits.detach(), output.basis.detach())
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0) + term.detach() / self._num_microbatches
        return weighted_sum(terms, self.config.losses, self.step)

    def open_batches(self, num_steps: int, num_held_out: int = 0) -> Iterator[Batch]:
        """This process's microbatches of the next `num_steps` steps. Of all samples so many are left out."""
        device = self.accelerator.device
        workers = self.config.data.num_workers
        timeout_s = 60 * self.config.train.timeout_minutes
        # A GPU makes sparse features dense in no time; 16 cores of its host could not do it for eight GPUs.
        split = replace(self.split, sparse_features=device.type != "cpu")
        plan = replace(self._plan(num_steps), num_held_out=num_held_out)
        batches = training_batches(split, plan, workers, device.type == "cuda", timeout_s)
        return move_ahead(batches, device)

    def _plan(self, num_steps: int) -> TrainingPlan:
        return TrainingPlan(
            num_samples=len(self.split),
            seed=self.config.seed,
            batch_size=self.config.train.batch_size,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            accumulation_steps=self._num_microbatches,
            samples_seen=self.samples_seen,
            last=self.samples_seen + num_steps * self.config.train.batch_size,
            mirror=self.config.data.mirror,
        )

    # ---- start and resume ----------------------------------------------------------------------------------------

    def _resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continues exactly from a checkpoint."""
        check_same_run(saved.state, self.config, self.dataset, self.cache, saved.path)
        checkpoint.restore(saved, self.network, self._average, self.optimizer, self.accelerator.process_index)
        self.step, self.samples_seen = saved.state.step, saved.state.samples_seen
        self._scores, self._best = saved.state.scores, saved.state.best
        self._slot_pixels = saved.state.slot_pixels
        console.say(f"{saved.path}: going on from step {self.step}")

    def open_run(self) -> None:
        """Creates the run's folder and opens the trackers."""
        if self.accelerator.is_main_process:
            self.folder.open(self.config, self.step)
            self._note_running()
            started_on = machine(self.accelerator.device) | {"processes": str(self.accelerator.num_processes)}
            self.files.write("machine.json", lambda: write_json(self.folder.machine, started_on), keep=1)
            if self.candidates:
                self.files.write("candidates.json", lambda: write_json(self.folder.candidates, self.candidates), keep=1)
            self.damage.reload(self.step)
        self.accelerator.wait_for_everyone()
        open_trackers(self.accelerator, self.step)

    # ---- what it writes ------------------------------------------------------------------------------------------

    def log(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Logs the step just taken to metrics.jsonl, the trackers and one printed line."""
        row = self._make_row(loss, grad_norm)
        if self._was_evaluated_now():
            row |= self._scores
        digest = row.pop("batch_digest")  # text, which TensorBoard cannot plot
        log_numbers(self.accelerator, self.files, row, self.step)
        if self.accelerator.is_main_process:
            self.files.write("metrics.jsonl", lambda: self.folder.log(row | {"batch_digest": digest}))
            if self.files.missing != self._noted_missing:
                self._note_running()
            console.say_plainly(
                f"step {self.step}/{self.config.train.total_steps}  loss {row['loss']:.6g}  "
                f"{row['images_per_second']:.1f} images/s  data wait {100 * row['data_wait']:.1f} %"
                + "".join(f"  {name} {100 * row[name]:.1f}" for name in ("val_nmi", "val_ari") if name in row)
            )
        self.stopwatch.restart()

    def _make_row(self, loss: Tensor, grad_norm: Tensor) -> dict[str, Any]:
        """The values to log for the step just taken. This is the only place where a step waits for the device."""
        loss = self.accelerator.reduce(loss, "mean")
        terms = {name: self.accelerator.reduce(term, "mean") for name, term in self._terms.items()}
        self.finite.check()
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "loss": loss.item(),
            **{f"loss_{name}": term.item() for name, term in terms.items()},
            **{f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups},
            "grad_norm": grad_norm.item(),
            **self.stopwatch.read(),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            **self._watch(),
            "damaged_samples": self.damage.agree(self.accelerator, self.step),
            "batch_digest": self._batch_digest() if self.accelerator.is_main_process else "",
        }

    def _watch(self) -> dict[str, float]:
        """The collapse monitors, averaged over processes; warns once about each likely cause."""
        assert self._watched is not None
        values = monitors.watch(*self._watched)
        means = self.accelerator.reduce(torch.stack(list(values.values())), "mean").tolist()
        row = dict(zip(values, means, strict=True))
        for cause, message in monitors.likely_causes(row, self.step, self.config).items():
            if cause not in self._warned and self.accelerator.is_main_process:
                console.warn(f"WARNING: step {self.step}: {message}")
            self._warned.add(cause)
        return row

    def _batch_digest(self) -> str:
        """Hash of the planned samples of the last global batch. Replacing damaged ones does not change it."""
        return batch_digest(self._plan(0).global_batch(self.samples_seen - self.config.train.batch_size))

    def _evaluate(self, request: StopRequest) -> None:
        if not self.dataset.num_samples("val"):
            return
        split = Split(self.dataset, "val", self.cache, with_labels=True)
        network = self._average.network if self._average else self.network
        limit = self.config.train.eval_images
        scores = evaluate_split(network, split, self.accelerator, limit, lambda: request.signal_number > 0)
        if scores is None:  # a stop was requested meanwhile: the coming step is the last
            return
        self._evaluated_step = self.step
        self._scores = {f"val_{name}": score for name, score in scores.pooled().items()}
        self._slot_pixels = scores.slot_pixels()
        self._note_best()
        if self.accelerator.is_main_process:
            picture = picture_of_split(network, split)
            path = self.folder.pictures / f"step-{self.step}.png"
            self.files.write("pictures", lambda: write_bytes(path, picture_bytes(picture)), keep=_WAITING_PICTURES)
            log_picture(self.accelerator, self.files, "parts", picture, self.step)
            evaluation = {"step": self.step, "confusion": scores.confusion()}
            evaluation |= {} if self._scores else {"no_scores": _NO_TRUTH}
            self.files.write("evaluation.json", lambda: write_json(self.folder.evaluation, evaluation), keep=1)

    def _note_running(self) -> None:
        step, self._noted_missing = self.step, self.files.missing
        note = lambda: self.folder.note("running", step, missing=self.files.missing)  # noqa: E731
        self.files.write("status.json", note, keep=1)

    def _write_page(self) -> None:
        self.files.write("report.html", lambda: write_page(self.folder), keep=1)

    def _note_best(self) -> None:
        name = self.config.train.best_score
        value = self._scores.get(f"val_{name}")
        if value is None:  # scoring is off, or there are no true parts to score against
            return
        before = self._best if self._best.get("score") == name else {}
        if value == value and value > before.get("value", float("-inf")):  # NaN: nothing to score
            self._best = {"score": name, "value": value, "step": self.step}

    def _was_evaluated_now(self) -> bool:
        return self._evaluated_step == self.step

    def save(self, writer: CheckpointWriter) -> None:
        """Hands the state of all processes to the writer."""
        self.finite.check()
        tensors = checkpoint.gather_tensors(self.network, self._average, self.optimizer, self.accelerator)
        if not self.accelerator.is_main_process:
            return
        state = checkpoint.State(
            step=self.step,
            samples_seen=self.samples_seen,
            config=to_mapping(self.config),
            shard_digest=self.dataset.digest,
            feature_digest=self.cache.digest,
            teacher_weights=self.cache.manifest["weights"],
            teacher_sha256=self.cache.manifest["weights_sha256"],
            scores=self._scores,
            best=self._best,
            class_names=self.dataset.class_names,
            order=ORDER,
            slot_pixels=self._slot_pixels,
        )
        writer.save(tensors, state, self._best.get("step"))
