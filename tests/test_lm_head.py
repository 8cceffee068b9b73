"""lm_head_of: what it finds in real architectures, what it refuses, and that it leaves no trace."""

import re
from types import SimpleNamespace

import pytest
import torch
from tiny_models import one_thread  # noqa: F401
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, parametrize

from rlhf_kernels import linear_token_logprobs, token_logprobs
from rlhf_kernels.lm_head import LMHead, lm_head_of

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, HIDDEN = 50, 32
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HALF = HIDDEN // 2
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "dim_model_base": 8,
}  # fmt: skip
# name: (class, what its config says beyond SIZES, the softcap and the scale that its formula has)
MODELS = {
    "llama": ("Llama", {}, None, 1.0),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, None, 1.0),
    "qwen2": ("Qwen2", {}, None, 1.0),
    "qwen3": ("Qwen3", {}, None, 1.0),
    "mistral": ("Mistral", {}, None, 1.0),
    "mixtral": ("Mixtral", {"num_local_experts": 2}, None, 1.0),
    "gemma": ("Gemma", {}, None, 1.0),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 5.0, "attn_implementation": "eager"}, 5.0, 1.0),
    "gemma3": ("Gemma3", {"final_logit_softcapping": 5.0}, 5.0, 1.0),
    "gemma3_uncapped": ("Gemma3", {"final_logit_softcapping": None}, None, 1.0),
    "nanochat": ("NanoChat", {"final_logit_softcapping": 15.0}, 15.0, 1.0),
    "granite": ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}, None, 1 / 8),
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 8.0}, None, 8.0),
    "minicpm3": ("MiniCPM3", MLA, None, 1 / 4),
    "cohere": ("Cohere", {"logit_scale": 0.0625}, None, 0.0625),
    "cohere2": ("Cohere2", {"logit_scale": 0.25}, None, 0.25),
    "phi": ("Phi", {}, None, 1.0),
    "phi3": ("Phi3", {}, None, 1.0),
    "gpt2": ("GPT2", {}, None, 1.0),
    "gpt_neox": ("GPTNeoX", {}, None, 1.0),
    "opt": ("OPT", {"word_embed_proj_dim": HALF, "ffn_dim": 48}, None, 1.0),
    "bloom": ("Bloom", {}, None, 1.0),
    "mamba": ("Mamba", {"state_size": 4}, None, 1.0),
}  # fmt: skip


def build(kind: str = "Llama", **beyond):
    """A seeded model whose logits are of the size of 1, with biases that are not zero."""
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config", None)
    model_class = getattr(transformers, f"{kind}ForCausalLM", None) or getattr(transformers, f"{kind}LMHeadModel", None)
    if config_class is None or model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = model_class(config_class(**(SIZES | beyond)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def rows(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def assert_fused_equals_logits(model, tolerance: float = 1e-5) -> LMHead:
    """Values, and gradients of the head's weight and of a weight below it."""
    head = lm_head_of(model)
    assert head.fused, head.reason
    ids = rows()
    below = next(p for n, p in head.decoder.named_parameters() if p.dim() == 2 and "embed" not in n and p.requires_grad)
    leaves = [p for p in (head.weight, below) if p.requires_grad]
    hidden = head.hidden(input_ids=ids, attention_mask=torch.ones_like(ids))
    ours = linear_token_logprobs(hidden[:, :-1], head.weight, ids[:, 1:], **head.options())
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    theirs = token_logprobs(logits[:, :-1], ids[:, 1:])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    upstream = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return head


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name):
    kind, beyond, softcap, scale = MODELS[name]
    model = build(kind, **beyond)
    head = assert_fused_equals_logits(model)
    assert (head.softcap, head.logit_scale) == (softcap, scale)
    assert head.weight is model.get_output_embeddings().weight
    assert head.weight.shape == (VOCAB, HALF if kind == "OPT" else HIDDEN)  # OPT projects within its decoder
    assert (head.bias is not None) == (kind == "Phi")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "granite", "phi"])
def test_dtypes(name, dtype):
    kind, beyond, softcap, scale = MODELS[name]
    head = lm_head_of(build(kind, **beyond).to(dtype))
    assert (head.reason, head.softcap, head.logit_scale) == (None, softcap, scale)


def test_autocast_and_logits_beyond_the_softcap():
    model = build("Gemma3", final_logit_softcapping=5.0, tie_word_embeddings=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lm_head_of(model).softcap == 5.0
    model.lm_head.weight.data.mul_(30)
    assert lm_head_of(model).softcap == 5.0


# What an architecture does not say in its config


class Wrong(transformers.LlamaForCausalLM):
    """A Llama that does to its logits what `after` says."""

    after = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.after(output.logits)
        return output


def wrong(after, **beyond):
    model = build("Llama", **beyond)
    model.__class__ = Wrong
    model.after = after
    return model


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (lambda logits: logits + torch.linspace(0, 0.1, VOCAB), "differ by"),
        (lambda logits: logits * 1.01, "differ by"),
        (lambda logits: 40 * torch.tanh(logits / 40), "differ by"),
        (lambda logits: logits[..., :-2], r"logits have the shape \(2, 4, 48\), its head's \(2, 4, 50\)"),
        (lambda logits: nn.functional.pad(logits, (0, 2)), r"\(2, 4, 52\)"),
        (lambda logits: logits.masked_fill(torch.arange(VOCAB) == 7, float("-inf")), "largest logit is inf"),
        (lambda logits: logits.masked_fill(torch.arange(VOCAB) == 7, -1e4), "differ by"),
        (lambda logits: logits * 0, "nothing to compare"),
        (lambda logits: logits * float("nan"), "largest logit is nan"),
        (lambda logits: logits.log_softmax(-1), "differ by"),
    ],
    ids=["added", "scaled", "capped", "cut", "padded", "inf", "masked", "zero", "nan", "normalised"],
)
def test_what_is_done_to_the_logits_is_seen(after, told):
    assert lm_head_of(wrong(lambda logits: logits)).fused
    head = lm_head_of(wrong(after))
    assert not head.fused
    assert re.search(told, head.reason), head.reason


def test_a_hidden_softcap_is_seen_in_large_logits_alone():
    """Logits of 0.2 under a cap of 100 differ from uncapped ones by 3e-7."""
    model = wrong(lambda logits: 100 * torch.tanh(logits / 100))
    model.lm_head.weight.data.mul_(0.05)
    assert lm_head_of(model).reason.endswith("small logits agree, large ones do not")


def test_softcaps_of_the_config():
    """One that the model ignores is not taken; one of the text config is found."""
    model = build()
    model.config.final_logit_softcapping = 30.0
    assert lm_head_of(model).softcap is None
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(logits_soft_cap=7.0))
    model.forward = lambda input_ids: 7 * torch.tanh(model.lm_head(model.model(input_ids)[0]) / 7)
    head = lm_head_of(model)
    assert (head.reason, head.softcap) == (None, 7.0)


def test_hooks_that_alter_the_head_are_seen():
    model = build()
    handles = [model.lm_head.register_forward_hook(lambda module, args, out: out + torch.linspace(0, 1, VOCAB))]
    assert "differ by" in lm_head_of(model).reason
    handles.pop().remove()
    handles.append(model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1),)))
    assert "the head's input is not the decoder's last hidden state" in lm_head_of(model).reason
    handles.pop().remove()
    model.lm_head.register_forward_hook(lambda module, args, out: None)
    assert lm_head_of(model).fused


def test_forwards_that_do_without_the_head_or_act_on_some_tokens():
    model = build()
    logits = lambda ids: model.lm_head(model.model(ids)[0])  # noqa: E731
    model.forward = lambda input_ids: SimpleNamespace(logits=model.model(input_ids)[0] @ model.lm_head.weight.T)
    assert "does not call its output embeddings" in lm_head_of(model).reason
    model.forward = lambda input_ids: logits(input_ids)
    assert lm_head_of(model).fused
    model.forward = lambda input_ids: (logits(input_ids) + (input_ids[..., None] == 11),)
    assert "differ by 1 of" in lm_head_of(model).reason


# Heads whose weight is not all there is


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_heads_whose_weight_is_computed():
    model = build()
    parametrizations.weight_norm(model.lm_head)
    assert "parametrized" in lm_head_of(model).reason
    parametrize.remove_parametrizations(model.lm_head, "weight")
    assert lm_head_of(model).fused
    nn.utils.weight_norm(model.lm_head)
    assert "weight norm" in lm_head_of(model).reason


def test_other_heads():
    class Own(nn.Linear):
        pass

    model = build()
    model.lm_head = Own(HIDDEN, VOCAB)
    assert "Own, not an nn.Linear" in lm_head_of(model).reason
    model.lm_head = nn.Linear(HIDDEN, VOCAB, device="meta")
    assert "torch.float32, meta: expected" in lm_head_of(model).reason
    model.lm_head = nn.Linear(HIDDEN, VOCAB)
    model.lm_head.weight.data = torch.empty(0)
    assert "gathered" in lm_head_of(model).reason
    model.lm_head = nn.Linear(HALF, VOCAB)
    assert "(2, 4, 16)" in lm_head_of(model).reason


@pytest.fixture
def mesh():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_heads(mesh):
    """Probed before sharding, a head in the root's group is whole when it is read in the root's forward."""
    model, ids = build(), rows()
    head = lm_head_of(model)
    expected = model(ids).logits
    fully_shard(model, mesh=mesh)
    assert "DTensor" in lm_head_of(model).reason and "final norm" in lm_head_of(model).reason
    model.forward = lambda ids: linear_token_logprobs(head.hidden(input_ids=ids), head.weight, ids, **head.options())
    torch.testing.assert_close(model(ids), token_logprobs(expected, ids), rtol=0, atol=1e-5)


def test_wrappers(mesh):
    model = build()
    reason = lm_head_of(nn.parallel.DistributedDataParallel(model)).reason
    assert reason.startswith("DistributedDataParallel wraps the model: pass model.module, and reduce the gradients")
    assert "pass model.module" in lm_head_of(nn.DataParallel(model)).reason
    head = lm_head_of(torch.compile(model, backend="eager"))
    assert head.fused and head.decoder is model.model
    flat = FullyShardedDataParallel(build(), device_id=torch.device("cpu"))
    assert "flattened shards" in lm_head_of(flat).reason


# PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def test_adapters_below_the_head(peft):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    plain, ids = build(), rows()
    before = plain(ids).logits
    model = peft.get_peft_model(plain, config).eval()
    head = assert_fused_equals_logits(model)
    on = head.hidden(input_ids=ids)
    with model.disable_adapter():
        off = head.hidden(input_ids=ids)
    assert (on - off).abs().max() > 1e-3
    torch.testing.assert_close(off @ head.weight.T, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["lora", "modules_to_save"],
)
def test_adapters_on_the_head(peft, options):
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, **options))
    assert "not an nn.Linear" in lm_head_of(model).reason


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_that_are_learned(peft, kind):
    """They act in the forward of the whole model, which the fused path does not call."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert not lm_head_of(peft.get_peft_model(build(), config)).fused


# What is no causal language model


def test_what_is_refused_at_once():
    with pytest.raises(TypeError, match="model: expected an nn"):
        lm_head_of("gpt2")
    assert "has no get_decoder()" in lm_head_of(nn.Linear(2, 2)).reason
    assert "no part of the model" in lm_head_of(build().model).reason
    kind = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=VOCAB, **kind))
    assert "encoder-decoder" in lm_head_of(bart).reason
    model = build()
    model.temperature = nn.Parameter(torch.ones(()))
    assert "parameters of its own" in lm_head_of(model).reason and "temperature" in lm_head_of(model).reason


def test_a_model_that_cannot_run():
    model = build()
    model.model.norm.forward = lambda x: x @ torch.ones(3)
    head = lm_head_of(model)
    assert head.reason.startswith("the model could not be run on 8 tokens: RuntimeError: ")
    with pytest.raises(RuntimeError, match="hidden: expected a head to fuse, got: the model could not be run"):
        head.hidden(input_ids=rows())


# hidden, and no trace


def test_arguments_of_hidden():
    ids = rows()
    head = lm_head_of(build())
    expected = head.hidden(input_ids=ids)
    assert torch.equal(head.hidden(input_ids=ids, labels=ids, logits_to_keep=1, return_dict=False), expected)
    caches = []
    head.decoder.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    head.hidden(input_ids=ids)
    head.hidden(input_ids=ids, use_cache=True)
    assert caches[0] is None and caches[1] is not None


def test_arguments_that_the_decoder_would_swallow_are_refused():
    """A text decoder takes **kwargs: images would vanish in it. This model ignores the softcap of its config."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=SIZES | {"final_logit_softcapping": 5.0},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
    )
    head = lm_head_of(transformers.Gemma3ForConditionalGeneration(config))
    assert (head.reason, head.softcap) == (None, None)
    with pytest.raises(ValueError, match="hidden: expected what the decoder takes, got \\['pixel_values'\\]"):
        head.hidden(input_ids=rows(), pixel_values=torch.zeros(1, 3, 28, 28))


def test_hidden_compiles_without_a_break():
    head, ids = lm_head_of(build()), rows()
    compiled = torch.compile(lambda ids: head.hidden(input_ids=ids), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), head.hidden(input_ids=ids))


def test_weights_are_those_of_the_last_step():
    model = build()
    head = lm_head_of(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, HIDDEN))
    assert head.weight is model.lm_head.weight and not head.weight.any()


def test_no_trace_is_left():
    model = build("GPT2", resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    model(rows()).logits.sum().backward()
    modes = [module.training for module in model.modules()]
    state = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    random = torch.get_rng_state()
    first = lm_head_of(model)
    assert first.fused
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name][0]) and torch.equal(parameter.grad, state[name][1])
    assert lm_head_of(model) == first


def test_no_trace_is_left_of_a_model_that_draws_and_fails():
    model = build().train()

    def draw(*args, **kwargs):
        torch.rand(3)
        raise RuntimeError("no")

    model.model.norm.forward = draw
    random = torch.get_rng_state()
    assert not lm_head_of(model).fused
    assert all(module.training for module in model.modules()) and not model.lm_head._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random)
