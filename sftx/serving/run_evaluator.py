"""Evaluation of a trained model as its run evaluates it, on the same rows or on others."""

from __future__ import annotations

from sftx.checkpoint.checkpoint import load_loss_module
from sftx.checkpoint.load_run import LoadedRun
from sftx.errors import ConfigError
from sftx.events import EvalReport
from sftx.serving.run_plugins import RunPlugins
from sftx.trainer.evaluate import ModelEvaluator
from sftx.trainer.parallel import ParallelStrategy, TrainStep
from sftx.trainer.precision import Precision, set_tf32


class RunEvaluator:
    """The evaluation of a run for its model, loaded: the code that evaluates while it trains, on one process."""

    def __init__(self, loaded: LoadedRun, plugins: RunPlugins) -> None:
        """Encode the held-out rows. Raises ConfigError, DataError, PluginError."""
        config, assembly, lm = plugins.config, plugins.assembly, loaded.lm
        loss, metrics, evaluators = assembly.loss(), assembly.metrics(), assembly.evaluators()
        if loss.needs_adapter and not lm.adapters:
            raise ConfigError(f"{loss}: compares with the model without its adapters, and {loaded.directory} has none")
        pipeline = plugins.pipeline(loaded)
        self.data = pipeline.load_eval(questions=bool(metrics or evaluators))
        if metrics and not self.data.questions:
            raise ConfigError(
                f"the metric {', '.join(metrics)} needs held-out conversations that end with an assistant's turn; give "
                "some with --eval-data, or leave the metric out with --no-plugin"
            )
        set_tf32(lm.device, enabled=config.train.tf32)
        step = TrainStep(lm, loss)
        load_loss_module(lm, loaded.directory)
        self._loaded = loaded
        self._evaluate = ModelEvaluator(
            self.data,
            collator=pipeline.collator,
            strategy=ParallelStrategy(step),
            metrics=metrics,
            evaluators=evaluators,
            encoder=loaded.encoder,
            precision=Precision(lm.device, loaded.compute_dtype),
            stop_ids=loaded.stop_ids,
            batch_size=config.train.per_device_eval_batch_size,
            generation=config.generation,
        )

    def trained(self) -> EvalReport:
        """Evaluate the model. Raises TrainingError, PluginError."""
        return self._evaluate(self._loaded.lm, 0)

    def base(self) -> EvalReport:
        """Evaluate the model without its adapters."""
        with self._loaded.lm.without_adapters():
            return self._evaluate(self._loaded.lm, 0)
