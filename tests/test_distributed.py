"""The tower under DistributedDataParallel, two real processes."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import images, psm_model, smoothed_tower


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    tower = smoothed_tower(psm=psm_model(), sigma=0.2, num_samples=2, feature_layer=-2)
    tower.vision_tower.requires_grad_(False)
    model = torch.nn.parallel.DistributedDataParallel(tower)
    output = model(images()[rank : rank + 1], generator=5, image_ids=[rank]).hidden_states[-2]
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in tower.psm.named_parameters() if p.grad is not None}
    torch.save((output.detach(), gradients), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, tmp_path), nprocs=2)
    (first, gradients), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))

    tower = smoothed_tower(psm=psm_model(), sigma=0.2, num_samples=2, feature_layer=-2)
    output = tower(images(), generator=5).hidden_states[-2]
    (output.square().sum() / 2).backward()
    torch.testing.assert_close(torch.cat([first, second]), output.detach(), rtol=1e-4, atol=1e-5)
    expected = {name: p.grad for name, p in tower.psm.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name in gradients:
        assert torch.equal(gradients[name], others[name]), name
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5)
