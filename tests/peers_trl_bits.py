"""`.venv-peers/bin/python tests/peers_trl_bits.py`: what TRL asserts of its functions on a CPU, dtype by dtype, asked
of the patched ones; exits with an AssertionError where it does not hold."""

import torch

import rlhf_kernels


def main() -> None:
    rlhf_kernels.patch("trl")
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


if __name__ == "__main__":
    main()
