"""The evaluation protocols on the state of a run."""

from collections.abc import Callable

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.defences import release_of
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.evaluation.knn import knn_top1
from mocosfl_jax.evaluation.linear_probe import Labelled, ProbeResult, linear_probe
from mocosfl_jax.evaluation.protocols import EvaluationData, Splits, encode_splits, evaluation_data
from mocosfl_jax.evaluation.raw_pixels import raw_pixel_top1
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.models.split import SplitModel, Variables
from mocosfl_jax.privacy.release import Release
from mocosfl_jax.run.metrics import Metrics
from mocosfl_jax.run.progress import Progress

Results = dict[str, float | None]
"""Accuracies in percent by their name in summary.json; None where a protocol was skipped."""


class Evaluator:
    """Runs the protocols, logs their numbers, and says once why they are skipped, if so."""

    def __init__(
        self,
        config: Resolved,
        placement: Placement,
        model: SplitModel,
        dataset: Dataset,
        metrics: Metrics,
        progress: Progress,
        check_stop: Callable[[], None],
    ):
        """Args: check_stop: called between the pieces of an evaluation; may raise to end it."""
        self._config, self._model, self._placement = config, model, placement
        self._metrics, self._progress, self._check_stop = metrics, progress, check_stop
        self._data = evaluation_data(dataset)
        if isinstance(self._data, str):
            progress.say(f"kNN and linear probe are skipped: {self._data}")

    def knn(self, variables: Variables, step: int) -> float | None:
        """kNN top-1 in percent, logged; None where it is skipped."""
        if isinstance(self._data, str):
            return None
        return self._knn(self._encoded(variables, self._data), self._data, step)

    def final(self, variables: Variables, step: int) -> Results:
        """kNN and linear probe of the last model, features encoded once, and kNN of the images
        themselves; kNN and probe once more with what defences draw, if they draw."""
        results: Results = dict.fromkeys(
            ("knn_top1", "linear_top1", "linear_top1_best_test_epoch", "knn_top1_raw_pixels")
        )
        data = self._data
        if isinstance(data, str):
            return results
        config, splits = self._config, self._encoded(variables, data)
        results["knn_top1"] = self._knn(splits, data, step)
        results["knn_top1_raw_pixels"] = raw_pixel_top1(
            *data.test,
            *data.train,
            data.num_classes,
            mean=config.mean,
            std=config.std,
            k=config.knn_k,
            temperature=config.knn_temperature,
            before_batch=self._check_stop,
        )
        if config.probe_epochs:
            result = self._probe(splits, data)
            results["linear_top1"] = result.top1_last
            results["linear_top1_best_test_epoch"] = result.top1_best_test_epoch
            self._metrics.add(step, linear_top1=result.top1_last)
        release = release_of(config)
        if release is not None and release.is_random:
            results |= self._released(self._encoded(variables, data, release), data)
        return results

    def _released(self, splits: Splits, data: EvaluationData) -> Results:
        """Accuracies on what the server would be sent."""
        probe = self._probe(splits, data).top1_last if self._config.probe_epochs else None
        return {"knn_top1_released": self._knn_top1(splits, data), "linear_top1_released": probe}

    def _encoded(
        self, variables: Variables, data: EvaluationData, drawn: Release | None = None
    ) -> Splits:
        return encode_splits(
            self._config, self._model, variables, data, self._placement, self._check_stop, drawn
        )

    def _probe(self, splits: Splits, data: EvaluationData) -> ProbeResult:
        config = self._config
        return linear_probe(
            Labelled(splits.train.features, splits.train.labels),
            Labelled(splits.test.features, splits.test.labels),
            data.num_classes,
            seed=config.seed,
            learning_rate=config.probe_learning_rate,
            batch_size=config.probe_batch_size,
            epochs=config.probe_epochs,
            before_epoch=self._check_stop,
        )

    def _knn(self, splits: Splits, data: EvaluationData, step: int) -> float:
        """kNN of the encoder, logged."""
        top1 = self._knn_top1(splits, data)
        self._metrics.add(step, knn_top1=top1)
        self._progress.say(f"step {step} of {self._config.total_steps}: kNN {top1:.2f} %")
        return top1

    def _knn_top1(self, splits: Splits, data: EvaluationData) -> float:
        """Weighted kNN on normalised head outputs; the bank is the train split."""
        return knn_top1(
            splits.test.embedding,
            splits.test.labels,
            splits.train.embedding,
            splits.train.labels,
            num_classes=data.num_classes,
            k=self._config.knn_k,
            temperature=self._config.knn_temperature,
            placement=self._placement,
            before_chunk=self._check_stop,
        )
