"""The Inception of FID in torch, from figures 5 to 7 of Szegedy et al. 2016 and what is published.

torchvision, which has the network that pytorch-fid changes, is not needed: the module names are
those of the published file, so that a twin's state_dict is such a file. What differs from
torchvision's is in `pool`, and can be turned back to show that a test would see it.
"""

import torch
from torch import nn

PUBLISHED, OF_TORCHVISION = 'published', 'of torchvision'


class Basic(nn.Module):
  def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
    super().__init__()
    self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
    self.bn = nn.BatchNorm2d(c_out, eps=0.001)

  def forward(self, x):
    return self.bn(self.conv(x)).clamp(min=0)


def same(c_in, c_out, height=1, width=1):
  return Basic(c_in, c_out, (height, width), padding=(height // 2, width // 2))


def halving(c_in, c_out):
  return Basic(c_in, c_out, 3, stride=2)


class Block(nn.Module):
  """Branches by their names, in `run`, with the pool beside them."""

  def __init__(self, pool):
    super().__init__()
    self.pool = pool

  def run(self, x, *names):
    for name in names:
      x = getattr(self, name)(x)
    return x

  def pooled(self, x):
    match self.pool:
      case 'halve':
        return nn.functional.max_pool2d(x, 3, 2)
      case 'max':
        return self.branch_pool(nn.functional.max_pool2d(x, 3, 1, 1))
      case 'mean of all':
        return self.branch_pool(nn.functional.avg_pool2d(x, 3, 1, 1))
    # The mean of the pixels that there are: of an image of ones, also at its rim, it is 1.
    total = nn.functional.avg_pool2d(x, 3, 1, 1)
    return self.branch_pool(total / nn.functional.avg_pool2d(torch.ones_like(x), 3, 1, 1))


class Of35(Block):
  def __init__(self, c, n, c_pool, pool):
    super().__init__(pool)
    self.branch1x1 = same(c, n(64))
    self.branch5x5_1, self.branch5x5_2 = same(c, n(48)), same(n(48), n(64), 5, 5)
    self.branch3x3dbl_1 = same(c, n(64))
    self.branch3x3dbl_2 = same(n(64), n(96), 3, 3)
    self.branch3x3dbl_3 = same(n(96), n(96), 3, 3)
    self.branch_pool = same(c, n(c_pool))

  def forward(self, x):
    five = self.run(x, 'branch5x5_1', 'branch5x5_2')
    three = self.run(x, 'branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3')
    return torch.cat([self.branch1x1(x), five, three, self.pooled(x)], dim=1)


class To17(Block):
  def __init__(self, c, n):
    super().__init__('halve')
    self.branch3x3 = halving(c, n(384))
    self.branch3x3dbl_1 = same(c, n(64))
    self.branch3x3dbl_2 = same(n(64), n(96), 3, 3)
    self.branch3x3dbl_3 = halving(n(96), n(96))

  def forward(self, x):
    three = self.run(x, 'branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3')
    return torch.cat([self.branch3x3(x), three, self.pooled(x)], dim=1)


class Of17(Block):
  def __init__(self, c, n, width, pool):
    super().__init__(pool)
    w, out = n(width), n(192)
    self.branch1x1 = same(c, out)
    self.branch7x7_1, self.branch7x7_2 = same(c, w), same(w, w, 1, 7)
    self.branch7x7_3 = same(w, out, 7, 1)
    self.branch7x7dbl_1, self.branch7x7dbl_2 = same(c, w), same(w, w, 7, 1)
    self.branch7x7dbl_3, self.branch7x7dbl_4 = same(w, w, 1, 7), same(w, w, 7, 1)
    self.branch7x7dbl_5 = same(w, out, 1, 7)
    self.branch_pool = same(c, out)

  def forward(self, x):
    seven = self.run(x, *(f'branch7x7_{i}' for i in (1, 2, 3)))
    double = self.run(x, *(f'branch7x7dbl_{i}' for i in (1, 2, 3, 4, 5)))
    return torch.cat([self.branch1x1(x), seven, double, self.pooled(x)], dim=1)


class To8(Block):
  def __init__(self, c, n):
    super().__init__('halve')
    out = n(192)
    self.branch3x3_1, self.branch3x3_2 = same(c, out), halving(out, n(320))
    self.branch7x7x3_1, self.branch7x7x3_2 = same(c, out), same(out, out, 1, 7)
    self.branch7x7x3_3, self.branch7x7x3_4 = same(out, out, 7, 1), halving(out, out)

  def forward(self, x):
    three = self.run(x, 'branch3x3_1', 'branch3x3_2')
    seven = self.run(x, *(f'branch7x7x3_{i}' for i in (1, 2, 3, 4)))
    return torch.cat([three, seven, self.pooled(x)], dim=1)


class Of8(Block):
  def __init__(self, c, n, pool):
    super().__init__(pool)
    w = n(384)
    self.branch1x1 = same(c, n(320))
    self.branch3x3_1 = same(c, w)
    self.branch3x3_2a, self.branch3x3_2b = same(w, w, 1, 3), same(w, w, 3, 1)
    self.branch3x3dbl_1, self.branch3x3dbl_2 = same(c, n(448)), same(n(448), w, 3, 3)
    self.branch3x3dbl_3a, self.branch3x3dbl_3b = same(w, w, 1, 3), same(w, w, 3, 1)
    self.branch_pool = same(c, n(192))

  def forward(self, x):
    three = self.branch3x3_1(x)
    double = self.run(x, 'branch3x3dbl_1', 'branch3x3dbl_2')
    ends = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
    ends += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
    return torch.cat([self.branch1x1(x), *ends, self.pooled(x)], dim=1)


class Twin(nn.Module):
  """Random weights; channels divided by `shrink`."""

  def __init__(self, shrink, variant=PUBLISHED):
    super().__init__()
    n = lambda channels: channels // shrink  # noqa: E731
    mean, last = ('mean', 'max') if variant == PUBLISHED else ('mean of all', 'mean of all')
    self.Conv2d_1a_3x3 = halving(3, n(32))
    self.Conv2d_2a_3x3 = Basic(n(32), n(32), 3)
    self.Conv2d_2b_3x3 = same(n(32), n(64), 3, 3)
    self.Conv2d_3b_1x1 = same(n(64), n(80))
    self.Conv2d_4a_3x3 = Basic(n(80), n(192), 3)
    self.Mixed_5b = Of35(n(192), n, 32, mean)
    self.Mixed_5c = Of35(n(256), n, 64, mean)
    self.Mixed_5d = Of35(n(288), n, 64, mean)
    self.Mixed_6a = To17(n(288), n)
    for name, width in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
      self.add_module(f'Mixed_{name}', Of17(n(768), n, width, mean))
    self.Mixed_7a = To8(n(768), n)
    self.Mixed_7b = Of8(n(1280), n, mean)
    self.Mixed_7c = Of8(n(2048), n, last)
    self.fc = nn.Linear(n(2048), 1008)

  def forward(self, x):
    """[b, 3, h, w] in [-1, 1] -> [b, 2048 / shrink]."""
    for name, module in self.named_children():
      if name in ('Conv2d_3b_1x1', 'Mixed_5b'):
        x = nn.functional.max_pool2d(x, 3, 2)
      if name != 'fc':
        x = module(x)
    return x.mean(dim=(2, 3))

  def randomise(self, images, seed):
    """Weights, and statistics near those of some images: deep features then differ by image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for module in self.modules():
        if isinstance(module, nn.Conv2d):
          noise = torch.randn(module.weight.shape, generator=generator)
          module.weight.copy_(noise / module.weight[0].numel() ** 0.5)
        elif isinstance(module, nn.BatchNorm2d):
          noise = torch.randn((2, module.num_features), generator=generator)
          module.weight.copy_(1 + 0.3 * noise[0])
          module.bias.copy_(0.3 * noise[1])
          module.momentum = 1.0
      self.train()(images)
      for module in self.modules():
        if isinstance(module, nn.BatchNorm2d):
          noise = torch.randn(module.num_features, generator=generator)
          module.running_mean.add_(0.3 * noise * module.running_var.sqrt())
          module.running_var.mul_(0.5 + torch.rand(module.num_features, generator=generator))
    return self.eval().requires_grad_(False)

  def tensors(self):
    """Those that are learned, by their names."""
    return {
      name: tensor.numpy().copy()
      for name, tensor in self.state_dict().items()
      if not name.startswith('fc.') and not name.endswith('num_batches_tracked')
    }
