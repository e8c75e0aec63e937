"""Evaluation of a trained model as its run evaluates it, on the same rows or on others."""

from __future__ import annotations

from sftx.checkpoint.checkpoint import load_loss_module
from sftx.checkpoint.layout import run_of
from sftx.checkpoint.load_run import LoadedRun
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import ConfigError
from sftx.events import EvalReport
from sftx.serving.run_plugins import RunPlugins
from sftx.trainer.evaluate import ModelEvaluator
from sftx.trainer.parallel import ParallelStrategy, TrainStep
from sftx.trainer.precision import Precision, set_tf32
from sftx.trainer.precompute import Precomputation, file_in


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
        strategy = ParallelStrategy(TrainStep(lm, loss))
        load_loss_module(lm, loaded.directory)
        self._loaded = loaded
        precision = Precision(lm.device, loaded.compute_dtype)
        self._evaluate = ModelEvaluator(
            self.data,
            collator=pipeline.collator,
            strategy=strategy,
            metrics=metrics,
            evaluators=evaluators,
            encoder=loaded.encoder,
            precision=precision,
            stop_ids=loaded.stop_ids,
            batch_size=config.train.per_device_eval_batch_size,
            generation=config.generation,
        )
        loss.prepare(self.data.examples)
        if loss.has_precompute and len(self.data.examples):
            batch_size = config.train.per_device_eval_batch_size
            find = Precomputation(
                strategy, pipeline.collator, precision, ProcessGroup(), batch_size, {"held-out": self.data.examples}
            )
            with lm.without_adapters():  # rows that the run has not held out: by the model as it was before training
                values = find.look_up(
                    file_in(run_of(loaded.directory) or loaded.directory),
                    is_trained=not lm.adapters,
                    model=str(loaded.directory),
                )
            self._evaluate.precomputed = values["held-out"]

    def trained(self) -> EvalReport:
        """Evaluate the model. Raises TrainingError, PluginError."""
        return self._evaluate(self._loaded.lm, 0)

    def base(self) -> EvalReport:
        """Evaluate the model without its adapters."""
        with self._loaded.lm.without_adapters():
            return self._evaluate(self._loaded.lm, 0)
