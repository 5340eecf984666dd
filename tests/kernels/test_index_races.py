"""Another thread that writes index tensors during a call cannot make native code read outside of its arguments."""

PROGRAM = """
import sys, threading, torch
from ssmkernels.ops.causal_conv1d import causal_conv1d
from ssmkernels.ops.decode_attention import decode_attention
from ssmkernels.ops.selective_scan import selective_scan

torch.set_num_threads(1)
x, weight, A, B = torch.ones(1, 64, 8), torch.ones(8, 4), -torch.ones(8, 4), torch.ones(1, 64, 4)
q, pages = torch.ones(1, 1, 2, 8), torch.ones(4, 16, 2, 8)
lengths, table = torch.tensor([64], dtype=torch.int32), torch.arange(4, dtype=torch.int32)[None]
cu_seqlens = torch.tensor([0, 20, 40, 64], dtype=torch.int32)
calls = {
    "causal_conv1d": (cu_seqlens[1:3], lambda: causal_conv1d(x, weight, cu_seqlens=cu_seqlens, implementation="cpu")),
    "selective_scan": (
        cu_seqlens[1:3], lambda: selective_scan(x, x, A, B, B, cu_seqlens=cu_seqlens, implementation="cpu")
    ),
    "lengths": (lengths, lambda: decode_attention(q, pages, pages, lengths, block_table=table, implementation="cpu")),
    "block_table": (table, lambda: decode_attention(q, pages, pages, lengths, block_table=table, implementation="cpu")),
}
sys.setswitchinterval(1e-5)
for name, (written, call) in calls.items():
    print(name, flush=True)
    right, wrong, done = written.clone(), torch.full_like(written, 2**30), threading.Event()

    def write():
        while not done.is_set():
            written.copy_(wrong)
            written.copy_(right)

    thread = threading.Thread(target=write)
    thread.start()
    passed = refused = 0
    while min(passed, refused) < 200 or passed + refused < 5000:
        try:
            call()
            passed += 1
        except ValueError:
            refused += 1
    done.set()
    thread.join()
"""


def test_a_writer_thread_ends_in_a_result_or_a_refusal(apart):
    assert apart(PROGRAM).split() == ["causal_conv1d", "selective_scan", "lengths", "block_table"]
