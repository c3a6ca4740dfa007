"""Text encoders of the transformers package are replayed as CUDA graphs, with the results of their own calls."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from districompile.live.text_encoders import graph_text_encoders

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
transformers = pytest.importorskip("transformers")


def clip() -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=32,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)  # type: ignore[no-any-return]


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)  # type: ignore[no-any-return]


def pipe_of(**parts: nn.Module) -> Any:
    return types.SimpleNamespace(components={"scheduler": object(), **parts})


def test_nothing_changes_on_a_cpu() -> None:
    encoder = clip().eval()
    forward = encoder.forward
    graph_text_encoders(pipe_of(text_encoder=encoder), on_first_call=True)
    assert encoder.forward == forward


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("make", [clip, t5])
@pytest.mark.parametrize("masked", [False, True])
def test_replayed_on_a_gpu(make: Any, masked: bool) -> None:
    torch.manual_seed(0)
    encoder = make().eval().cuda().half()
    other = nn.Linear(4, 4).cuda()
    forward = encoder.forward
    pipe = pipe_of(text_encoder_2=encoder, vae=other)
    graph_text_encoders(pipe)

    def ids(seed: int) -> Tensor:
        return torch.randint(3, 98, (2, 77), generator=torch.Generator().manual_seed(seed)).cuda()

    mask = torch.ones(2, 77, dtype=torch.long, device="cuda")
    mask[1, 40:] = 0
    extra = {"attention_mask": mask} if masked else {}
    results = []
    with torch.no_grad():
        for seed in range(5):
            results.append(encoder(ids(seed), output_hidden_states=True, **extra))
        for seed, got in enumerate(results):
            want = forward(ids(seed), output_hidden_states=True, **extra)
            assert type(got) is type(want)
            for a, b in zip(got.to_tuple(), want.to_tuple(), strict=True):
                pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
                for x, y in pairs:
                    assert torch.isfinite(x).all()
                    assert float((x - y).float().norm() / y.float().norm()) <= 2e-3
        graphs = [c for c in encoder.forward.__closure__ or () if hasattr(c.cell_contents, "_recorded")]
        recorded = graphs[0].cell_contents._recorded
        assert len(recorded) == 1 and all(found is not None for found in recorded.values())
