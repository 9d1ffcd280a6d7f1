"""The evaluation protocols on the state of a run."""

from collections.abc import Callable

from mocosfl_jax.config import Resolved
from mocosfl_jax.config.defences import release_of
from mocosfl_jax.data.dataset import Dataset
from mocosfl_jax.evaluation.numbers import NUMBERS
from mocosfl_jax.evaluation.protocols import (
    PROTOCOLS,
    Evaluation,
    EvaluationData,
    Results,
    encode_splits,
    evaluation_data,
    knn,
    linear,
)
from mocosfl_jax.evaluation.raw_pixels import raw_pixel_top1
from mocosfl_jax.federated.placement import Placement
from mocosfl_jax.models.split import SplitModel, Variables
from mocosfl_jax.privacy.release import Release
from mocosfl_jax.run.metrics import Metrics
from mocosfl_jax.run.progress import Progress


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
        return self._logged("knn", self._encoded(variables, self._data), step)["knn_top1"]

    def final(self, variables: Variables, step: int) -> dict[str, float | None]:
        """The protocols of a run's end on the last model, features encoded once, and kNN of the
        images themselves; kNN and linear probe once more with what defences draw, if they draw.
        None stands for what was skipped."""
        results: dict[str, float | None] = dict.fromkeys(
            ("knn_top1", "linear_top1", "linear_top1_best_test_epoch", "knn_top1_raw_pixels")
        )
        data, config = self._data, self._config
        if isinstance(data, str):
            return results
        evaluation = self._encoded(variables, data)
        for name in _at_the_end(config):
            results |= self._logged(name, evaluation, step)
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
        release = release_of(config)
        if release is not None and release.is_random:
            results |= self._released(self._encoded(variables, data, release))
        return results

    def _released(self, evaluation: Evaluation) -> dict[str, float | None]:
        """Accuracies on what the server would be sent."""
        probe = linear(evaluation)["linear_top1"] if self._config.probe_epochs else None
        return {"knn_top1_released": knn(evaluation)["knn_top1"], "linear_top1_released": probe}

    def _encoded(
        self, variables: Variables, data: EvaluationData, drawn: Release | None = None
    ) -> Evaluation:
        """The data as this network sees them."""
        config, placement, check_stop = self._config, self._placement, self._check_stop
        splits = encode_splits(config, self._model, variables, data, placement, check_stop, drawn)
        return Evaluation(config, splits, data.num_classes, placement, check_stop)

    def _logged(self, name: str, evaluation: Evaluation, step: int) -> Results:
        """What a protocol finds, logged as far as a person sees it at the end."""
        found = PROTOCOLS[name](evaluation)
        shown = {name: value for name, value in found.items() if NUMBERS[name].in_table}
        self._metrics.add(step, **shown)
        if name == "knn":
            top1 = found["knn_top1"]
            self._progress.say(f"step {step} of {self._config.total_steps}: kNN {top1:.2f} %")
        return found


def _at_the_end(config: Resolved) -> tuple[str, ...]:
    """Names of the protocols that a run goes through when it is trained."""
    probes = ("linear", "semi_supervised") if config.semi_supervised else ("linear",)
    return ("knn", *(probes if config.probe_epochs else ()))
