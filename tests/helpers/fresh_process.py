"""Computes a layer with the C++ kernels in a process that has not loaded them yet; prints whether there were any.

A script, so that tests can start it in ways that would end a process: tests/ops/test_compiled_cache.py.
"""

import torch

from contextual_cnn.ops import sampled_conv_cpp, sampled_conv_torch

available = sampled_conv_cpp.is_available()
if available:
    arguments = torch.randn(1, 8, 5, 6), torch.randn(1, 8, 3, 3), torch.randn(1, 18, 5, 6), None, (1, 1, 1)
    torch.testing.assert_close(sampled_conv_cpp.forward(*arguments), sampled_conv_torch.forward(*arguments))
print("computed by", "the kernels" if available else "plain torch")
