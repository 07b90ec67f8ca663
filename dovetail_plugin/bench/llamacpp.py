"""llama.cpp as an engine of a comparison, through the wheel of `xllamacpp`: passes and plain generation, no drafts.

Takes a GGUF file of the target. Requests have token ids, so the tokenizer of the file is not used. A pass is the prompt
of a request behind tokens that are in the cache already; llama.cpp itself reports its milliseconds.
"""

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .compare import Run
from .engines import ROWS, TimedPass, tokens_of

SPARE = 16
"""Tokens of a text beyond those that are asked for."""


class LlamaCpp:
    """A model that llama.cpp runs.

    Args:
        name: names the engine in the tables.
        file: GGUF file with the weights of the target.
        config: of the target.
        most_tokens: tokens of the longest text.
        threads: number of CPU threads; None takes torch's number.
        share: of the file's bytes that the linear layers have.

    Raises:
        ImportError: xllamacpp is not installed.
        InputError: the file cannot be loaded.

    Attributes:
        weight_bytes: bytes of its linear layers' weights.
    """

    def __init__(
        self, name: str, file: Path, config: Any, *, most_tokens: int, threads: int | None = None, share: float = 1.0
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise ImportError(f"{file} needs llama.cpp: pip install xllamacpp.")
        import xllamacpp

        if not file.is_file():
            raise InputError(f"{file}: there is no such file.")
        self.name, self.weight_bytes, self._config = name, int(file.stat().st_size * share), config
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = max(most_tokens, 1) + max(ROWS) + SPARE
        settings.n_parallel, settings.n_gpu_layers, settings.verbosity = 1, 0, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        try:
            self._server = xllamacpp.Server(settings)
        except Exception as error:  # of llama.cpp's own kinds
            raise InputError(f"{file}: llama.cpp cannot load it ({error}).") from error

    def pass_behind(self, ids: Tensor) -> TimedPass:
        """Return timed passes behind `ids` (1, T) int64.

        Raises:
            InputError: llama.cpp refuses a request, or computes other rows than it is asked for.
        """
        context = ids[0].tolist()
        self._complete(context, 1, cached=True)
        # The first token of a pass is not that of the pass before, so all of its rows are computed.
        starts = itertools.count(len(context), max(ROWS) + 1)

        def timed(rows: int) -> float:
            new = tokens_of(self._config, rows, next(starts)).tolist()
            times = self._complete(context + new, 1, cached=True)
            if times["prompt_n"] != rows:
                raise InputError(f"{self.name} ran {times['prompt_n']} rows instead of {rows}.")
            return times["prompt_ms"] / 1e3

        return timed

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Run:
        """Generate greedily from a prompt (1, T) int64. Texts are not returned, only their length and seconds.

        Raises:
            InputError: llama.cpp refuses the request.
        """
        times = self._complete(input_ids[0].tolist(), max_new_tokens, cached=False)
        return Run(times["predicted_n"], (times["prompt_ms"] + times["predicted_ms"]) / 1e3, input_ids)

    def _complete(self, tokens: list[int], count: int, *, cached: bool) -> dict[str, Any]:
        """Return the timings of a request."""
        request = {"prompt": tokens, "n_predict": count, "temperature": 0, "cache_prompt": cached}
        answer = self._server.handle_completions(request)
        if "timings" not in answer:
            raise InputError(f"{self.name} refuses a request of {len(tokens)} tokens: {answer}.")
        return answer["timings"]
