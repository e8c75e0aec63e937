"""The exporter `ollama`: a GGUF file, and the Modelfile from which Ollama makes a model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from sftx import ExportSource
from sftx_plugins.exporters.gguf import Gguf


@dataclass(frozen=True, eq=False)
class Ollama(Gguf):
    """Writes a directory for `ollama create`: a GGUF file, and a Modelfile with the run's template and stops."""

    def export(self, source: ExportSource, directory: Path) -> None:
        # The template is tried before the weights are written.
        modelfile = self._modelfile(source, self._file(directory))
        super().export(source, directory)
        (directory / "Modelfile").write_text(modelfile, encoding="utf-8")

    def usage(self, directory: Path) -> str:
        file = shlex.quote(str(directory / "Modelfile"))
        return f"ollama create my-model --file {file} && ollama run my-model"

    def _modelfile(self, source: ExportSource, file: Path) -> str:
        from sftx_plugins.exporters.gguf_format.vocabulary import begins_with_bos
        from sftx_plugins.exporters.go_template import markup_of

        tokenizer = source.tokenizer
        lines = [f"FROM ./{file.name}"]
        if isinstance(tokenizer.chat_template, str):
            markup = markup_of(tokenizer)
            bos = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
            lines.append(f'TEMPLATE """{markup.to_go(bos=bos)}"""')
            if markup.default_system and not markup.default_system.endswith('"'):  # four quotes would end it early
                lines.append(f'SYSTEM """{markup.default_system}"""')
            elif markup.before_system is None:
                lines.append("# The template has no place for a system text, and leaves it out.")
        else:
            lines.append('TEMPLATE """{{ .Prompt }}"""')
        # The file's tokens end an answer by their number; these are for servers that look at its text.
        added = tokenizer.get_added_vocab()
        stops = [str(text) for text in tokenizer.convert_ids_to_tokens(list(source.stop_ids)) if text in added]
        lines += [f'PARAMETER stop "{stop}"' for stop in stops]
        return "\n".join(lines) + "\n"
