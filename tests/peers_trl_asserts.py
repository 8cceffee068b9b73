"""`.venv-peers/bin/python tests/peers_trl_asserts.py`: what TRL asserts of its functions on a CPU, dtype by dtype,
asked of the patched ones; and its fused head on models that cap, scale or shift their logits, patched beside unpatched.
Exits with an AssertionError where something does not hold."""

import torch

import rlhf_kernels

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "Llama": {}, "Gemma2": {"final_logit_softcapping": 5.0, "head_dim": 8}, "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0}, "Phi": {}, "GPT2": {},
}  # fmt: skip
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def functions() -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        exact = {"rtol": 0, "atol": 0} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
        logits, ids = torch.randn(4, 32, 1024, dtype=dtype), torch.randint(1024, (4, 32))
        many = torch.randint(1024, (4, 32, 8))
        logp = logits.log_softmax(-1)
        torch.testing.assert_close(selective_log_softmax(logits, ids), logp.gather(-1, ids[..., None])[..., 0], **exact)
        torch.testing.assert_close(selective_log_softmax(logits, many), logp.gather(-1, many), **exact)
        for shape in ((768,), (32, 768), (2, 4, 8, 768)):
            logits = torch.randn(shape, dtype=dtype)
            logp = logits.log_softmax(-1)
            torch.testing.assert_close(entropy_from_logits(logits, 16), -(logp.exp() * logp).sum(-1), **exact)
        found = selective_log_softmax_and_entropy(
            torch.randn(4, 9, 64, dtype=dtype), ids[:, :9] % 64, row_mask=ids[:, :9]
        )
        assert all(x.dtype == dtype for x in found)


def of_head(name: str) -> dict[str, torch.Tensor]:
    """Outputs of TRL's fused head, and the gradient of every parameter."""
    import transformers
    from trl.trainer.utils import add_fused_lm_head

    config = getattr(transformers, f"{name}Config")(
        **(SIZES if name != "GPT2" else {"n_embd": 16, "n_head": 2}), **MODELS[name]
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    add_fused_lm_head(model, temperature=0.8, outputs=OUTPUTS)
    ids = torch.randint(3, 50, (3, 9))
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[2], [5], [0]]), -100)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=7)
    (found.loss + found.entropy.square().sum()).backward()
    gradients = {f"d_{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(found, name) for name in ("loss", *OUTPUTS)} | gradients


def heads() -> None:
    for name in MODELS:
        with rlhf_kernels.patch("trl"):
            ours = of_head(name)
        theirs = of_head(name)
        assert set(ours) == set(theirs) and len(theirs) > 12
        for key, want in theirs.items():
            torch.testing.assert_close(ours[key], want, rtol=1e-4, atol=1e-5, msg=f"{name}: {key} differs")


if __name__ == "__main__":
    with rlhf_kernels.patch("trl"):
        functions()
    heads()
