"""The code that MLflow keeps with a registered model, and runs when the model is loaded: an export, opened by its own library.

MLflow stores this file as text next to the export ("models from code"), so that nothing is pickled. It needs the export's library and
not Diptych.
"""

import json
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ExportedModel(PythonModel):
    """An exported folder; `mlflow.pyfunc.load_model(URI).unwrap_python_model().folder` is what the model card speaks of."""

    def load_context(self, context: Any) -> None:
        """Find the export; its library is loaded at the first prediction."""
        self.folder = str(context.artifacts["export"])
        self.task = json.loads((Path(self.folder) / "diptych_run.json").read_text())["task"]["name"]
        self._pipeline: Any = None

    # Without a type for its input, which MLflow would take for the model's signature.
    def predict(self, context: Any, model_input, params: dict[str, Any] | None = None) -> list[str]:  # type: ignore[no-untyped-def]
        """gpt2: the greedy continuation of every row of the first column; `params`: `max_new_tokens`. Others are opened by their library."""
        if self.task != "gpt2":
            card = Path(self.folder) / "README.md"
            raise ValueError(f"a {self.task} model is opened by its own library, as {card} says; its files stand in {self.folder}")
        if self._pipeline is None:
            from transformers import pipeline

            self._pipeline = pipeline("text-generation", self.folder)
        prompts = [str(text) for text in (model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input)]
        most = int((params or {}).get("max_new_tokens", 64))
        # The prompts that the model learned begin with its start token.
        start = self._pipeline.tokenizer.bos_token or ""
        told = self._pipeline([start + prompt for prompt in prompts], max_new_tokens=most, do_sample=False, add_special_tokens=False)
        return [rows[0]["generated_text"].removeprefix(start) for rows in told]


set_model(ExportedModel())
