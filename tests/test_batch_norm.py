"""BatchNorm over processes, for torch.compile."""

from conftest import REPOSITORY
from forked_scripts import forked

TWO_PROCESSES = """
import copy, shutil, torch, torch.distributed as dist
from torch import nn
from modeling_poodle import PoodleConfig, PoodleForPreTraining
from test_modeling_pretraining import config, inputs
from training.batch_norm import EqualSyncBatchNorm2d, for_compilation

dist.init_process_group("gloo")
rank = dist.get_rank()

# Alone, over the batches of both.
torch.manual_seed(0)
for momentum, level in ((0.1, 0.0), (None, 300.0)):
    alone = nn.BatchNorm2d(5, momentum=momentum)
    nn.init.normal_(alone.weight), nn.init.normal_(alone.bias), nn.init.constant_(alone.running_mean, level)
    shared = for_compilation(nn.Sequential(copy.deepcopy(alone)))
    assert type(shared[0]) is EqualSyncBatchNorm2d
    for step in range(2):
        whole = (level + torch.randn(4, 5, 6, 7)).requires_grad_()
        weight = torch.randn(4, 5, 6, 7)
        mine = whole.detach()[2 * rank : 2 * rank + 2].requires_grad_()
        alone.zero_grad(), shared.zero_grad()
        expected, found = alone(whole), shared(mine)
        (expected * weight).sum().backward()
        (found * weight[2 * rank : 2 * rank + 2]).sum().backward()
        close = dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, expected[2 * rank : 2 * rank + 2], **close)
        torch.testing.assert_close(mine.grad, whole.grad[2 * rank : 2 * rank + 2], **close)
        for parameter, twin in zip(shared.parameters(), alone.parameters()):
            total = parameter.grad.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, twin.grad, rtol=1e-3, atol=1e-3)
        for buffer, twin in zip(shared.buffers(), alone.buffers()):
            torch.testing.assert_close(buffer, twin, rtol=1e-4, atol=1e-4)
    assert shared(mine.bfloat16()).dtype == torch.bfloat16
    shared[0].load_state_dict(alone.state_dict())
    torch.testing.assert_close(shared.eval()(mine), alone.eval()(mine), **close)

# The whole of a step in one graph, whose loss is that of eager; without the sums over both, another. One rank compiles, since each takes
# seconds; the other makes the same sums in eager mode. Not rank 0: what knows no rank would pass for it there.
compiles = rank == 1
torch.manual_seed(0)
model = PoodleForPreTraining(config(num_decoder_blocks=0, pooled_weight=0)).train()  # the rest takes Dynamo three times as long
batch = inputs(seed=rank)
own = copy.deepcopy(model)(**batch).loss.item()
for_compilation(model)
eager = copy.deepcopy(model)(**batch).loss
torch._dynamo.reset()
graphs = []
kept = lambda graph, _: graphs.append(graph) or graph.forward
stepped = torch.compile(model, backend=kept, fullgraph=True, dynamic=False) if compiles else model
losses = [stepped(**batch).loss for _ in range(2)]
losses[1].backward()
assert len(graphs) == compiles, len(graphs)
assert abs(eager.item() - own) > 1e-4
assert abs(losses[0].item() - eager.item()) < 1e-4

# Inductor too, whose buffers are not those of eager: a twin in double precision that nothing was compiled of.
def gradient(network, dtype, compiled):
    torch.manual_seed(rank)
    images = (3 * torch.randn(8, 16, 12, 16) + 1).to(dtype).requires_grad_()
    network = copy.deepcopy(network).to(dtype)
    out = (torch.compile(network, dynamic=False) if compiled else network)(images)
    (out * torch.randn(8, 16, 12, 16).to(dtype)).sum().backward()
    return images.grad.double()

if shutil.which("g++"):
    torch.manual_seed(0)
    network = for_compilation(nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)))
    expected = gradient(network, torch.float64, False)
    found = gradient(network, torch.float32, compiles)
    assert (found - expected).norm() < 1e-5 * expected.norm(), (found - expected).norm() / expected.norm()
print(f"rank {rank} fine", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_it_is_batch_norm_over_the_batches_of_all_and_compiles_to_one_graph(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    done = forked(script, ranks=2, PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 fine" in done.stdout and "rank 1 fine" in done.stdout
