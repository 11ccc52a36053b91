"""Shows what a text model writes: a sample of generated text at the end of a run."""

from pathlib import Path

import lightning as L
import torch

from causalrn.evaluation.metrics import is_text
from causalrn.models import LanguageModel
from causalrn.models.decoding import Sampling, count_new_tokens, generate
from causalrn.system import check_range
from causalrn.training.strategies import whole_network


class SampleText(L.Callback):
    """Prints text generated after the closing validation, and keeps it in sample.txt of the run folder.

    Args:
        prompt: text to continue.
        n_tokens: number of tokens to generate.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draws among the k most likely tokens only.
        seed: of the draws.

    Raises:
        ValueError: a number out of its range, or no prompt; at the start of a run, data that is no text, or more
            tokens than the model takes.
    """

    def __init__(
        self,
        prompt: str,
        n_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = 40,
        seed: int = 0,
    ) -> None:
        check_range(self, "[1, inf)", n_tokens=n_tokens)
        Sampling(temperature, top_k)
        if not prompt:
            raise ValueError("SampleText: prompt is empty: want the beginning of a text")
        self.prompt = prompt
        self.n_tokens = n_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not is_text(data):
            raise ValueError(
                f"SampleText continues natural text: want a DataModule of text, got {type(data).__name__}"
            )
        # A prompt that is too long is refused now, not at the end of the run.
        tokenizer = trainer.datamodule.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        network = pl_module.network
        assert isinstance(network, LanguageModel)
        count_new_tokens(network, len(tokenizer.encode(self.prompt)), self.n_tokens)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "validate":
            return
        network = whole_network(pl_module)
        if network is None:
            return
        tokenizer = trainer.datamodule.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        prompt = torch.as_tensor(tokenizer.encode(self.prompt).astype("int64"), device=pl_module.device)[None]
        # With a generator of its own the text does not depend on what was drawn before.
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        tokens = generate(
            network,
            prompt,
            self.n_tokens,
            Sampling(self.temperature, self.top_k),
            generator=generator,
        )
        # They are decoded together: a tokenizer may spell a space with the word after it, and drop it where a text begins.
        whole = tokenizer.decode(torch.cat([prompt[0], tokens[0]]).cpu().numpy())
        text = self.prompt + whole[len(tokenizer.decode(prompt[0].cpu().numpy())) :]
        Path(trainer.default_root_dir, "sample.txt").write_text(text + "\n")
        print(f"\n{text}\n", flush=True)
