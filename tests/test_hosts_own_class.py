"""Hosts that construct their own vision class: smoothed in memory, and not saved until they are plain again."""

import copy
import os

import pytest
import torch
from host_models import HOSTS, host_inputs
from tiny_models import MEAN, STD, images, psm_model

from fs_psm_hf import SmoothedVisionTower, attach, detach
from fs_psm_hf.host_kinds import OWN_CLASS_HOSTS, find_tower


STATISTICS = {"image_mean": MEAN, "image_std": STD}
each_host = pytest.mark.parametrize("name", OWN_CLASS_HOSTS)
masked = pytest.mark.parametrize("name", ["idefics2", "idefics3", "smolvlm"])


def levels(host):
    return {"whole": host, "inner": getattr(host, "model", host)}


@each_host
@pytest.mark.parametrize("attached", ["whole", "inner"])
def test_saving_is_refused_at_each_level_until_detached_at_any(name, attached, tmp_path):
    host = HOSTS[name].build()
    for detached in ("whole", "inner"):
        attach(levels(host)[attached], psm_model(), **STATISTICS)
        for level in ("whole", "inner"):
            folder = tmp_path / f"{detached}-{level}"
            with pytest.raises(
                ValueError, match=rf"`host` \({name}\) cannot be saved with its tower smoothed, because"
            ):
                levels(host)[level].save_pretrained(folder)
            assert os.listdir(folder) == []
        with pytest.raises(ValueError, match="cannot be saved"):
            host.config.save_pretrained(tmp_path / "config")
        detach(levels(host)[detached])
        host.save_pretrained(tmp_path / detached)
        reloaded = type(host).from_pretrained(tmp_path / detached)
        state = reloaded.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in host.state_dict().items())


@each_host
def test_a_copy_of_a_smoothed_host_is_one_too(name, tmp_path):
    host = HOSTS[name].build()
    attach(host, psm_model(), **STATISTICS)
    twin = copy.deepcopy(host)
    with pytest.raises(ValueError, match="cannot be saved"):
        twin.save_pretrained(tmp_path / "twin")
    detach(twin)
    twin.save_pretrained(tmp_path / "twin")
    assert isinstance(find_tower(host).tower, SmoothedVisionTower)
    with pytest.raises(ValueError, match="cannot be saved"):
        host.save_pretrained(tmp_path / "host")


@each_host
def test_the_tower_reloads_alone(name, tmp_path):
    tower = attach(HOSTS[name].build(), psm_model(), sigma=0.2, num_samples=2, **STATISTICS)
    tower.save_pretrained(tmp_path)
    again, info = SmoothedVisionTower.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    first, second = (one(images(2), generator=5).last_hidden_state for one in (tower, again))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@each_host
def test_a_psm_reattaches(name, tmp_path):
    host, psm = HOSTS[name].build(), psm_model()
    expected = attach(host, psm, sigma=0.2, num_samples=2, **STATISTICS)(images(2), generator=5).last_hidden_state
    psm.save_pretrained(tmp_path)
    detach(host)
    tower = attach(host, type(psm).from_pretrained(tmp_path), sigma=0.2, num_samples=2, **STATISTICS)
    assert torch.equal(tower(images(2), generator=5).last_hidden_state, expected)


@masked
def test_masks_go_with_the_copies_of_their_image(name):
    tower = attach(HOSTS[name].build(), psm_model("none"), sigma=0.2, num_samples=3, **STATISTICS)
    masks = torch.ones(2, 4, 4, dtype=torch.bool)
    masks[0, 2:] = masks[1, :, 3:] = False
    together = tower(images(2), patch_attention_mask=masks, generator=5).last_hidden_state
    for i in range(2):
        one = {"pixel_values": images(2)[i : i + 1], "patch_attention_mask": masks[i : i + 1]}
        alone = tower(**one, generator=5, image_ids=[i]).last_hidden_state
        torch.testing.assert_close(together[i : i + 1], alone)
    unmasked = tower(images(2), generator=5).last_hidden_state
    assert (together - unmasked).abs().amax((1, 2)).min() > 1e-3


@masked
def test_padded_images_of_a_batch_keep_their_logits(name):
    host = HOSTS[name].build()
    inputs = host_inputs(host, name, 1, 2)
    mask = torch.ones(1, 2, 16, 16, dtype=torch.long)
    mask[:, 0, 8:], mask[:, 1, :, 12:] = 0, 0
    with torch.no_grad():
        expected, unmasked = host(**inputs, pixel_attention_mask=mask).logits, host(**inputs).logits
        attach(host, sigma=0, num_samples=1, **STATISTICS)
        assert torch.equal(host(**inputs, pixel_attention_mask=mask).logits, expected)
    assert not torch.equal(expected, unmasked)


def test_idefics_takes_images_of_another_size():
    host = HOSTS["idefics"].build()
    inputs = host_inputs(host, "idefics", 1, 1)
    inputs |= {"pixel_values": images(1, 24)[None], "interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = host(**inputs).logits
        attach(host, sigma=0, num_samples=1, **STATISTICS)
        assert torch.equal(host(**inputs).logits, expected)
