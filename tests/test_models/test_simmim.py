"""SimMIM over Swin V2: hidden patches are replaced, and nothing else is."""

import torch

from greenmim_mm.models import GreenSwinV2, SimMIMSwinTransformerV2

ARCH = dict(embed_dims=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8])
ARCH['extra_norm_every_n_blocks'] = 0


def make():
    torch.manual_seed(0)
    model = SimMIMSwinTransformerV2(ARCH, window_size=2, drop_path_rate=0.0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval()
    return model


def test_hidden_patches_do_not_matter():
    model = make()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    mask = torch.zeros(2, 16, 16)
    mask[0, :8] = 1
    before = model(images, mask)[0]
    changed = images.clone()
    changed[0, :, :32] += 1
    assert torch.equal(model(changed, mask)[0], before)
    assert not torch.equal(model(changed, torch.zeros_like(mask))[0], before)
    # The mask does not stay behind.
    torch.testing.assert_close(model(images, None)[0][1], before[1])
    assert not torch.allclose(model(images, None)[0][0], before[0])


def test_all_hidden_is_the_token_everywhere():
    """The dense network on an embedding that is the mask token."""
    model = make()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    out = model(images, torch.ones(1, 16, 16))[0]
    with torch.no_grad():
        model.patch_embed.projection.weight.zero_()
        model.patch_embed.norm.weight.zero_()
        model.patch_embed.norm.bias.copy_(model.mask_token.flatten())
    torch.testing.assert_close(model(images, None)[0], out)


def test_gradient_of_the_mask_token():
    model = make()
    mask = torch.zeros(1, 16, 16)
    mask[0, 0] = 1
    model(torch.randn(1, 3, 64, 64, dtype=torch.float64), mask)[0].sum().backward()
    assert model.mask_token.grad.abs().sum() > 0


def test_initialisation_is_that_of_green_swin_v2():
    torch.manual_seed(0)
    theirs = SimMIMSwinTransformerV2('tiny')
    theirs.init_weights()
    ours = GreenSwinV2('tiny')
    ours.init_weights()
    reference = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        # mmpretrain's embedding keeps PyTorch's default, as ours does.
        if name == 'mask_token' or name.startswith('patch_embed.projection'):
            continue
        torch.testing.assert_close(parameter.mean(), reference[name].mean(), atol=2e-3, rtol=0)
        if parameter.numel() > 1000:
            torch.testing.assert_close(parameter.std(), reference[name].std(), atol=2e-3, rtol=0)
