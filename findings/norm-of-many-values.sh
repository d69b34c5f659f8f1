#!/usr/bin/env bash
# torch 2.13.0 (CPU): the 2-norm of a tensor of many values
#
# Guess:   `torch.linalg.vector_norm` is as accurate as `x.square().sum().sqrt()`: torch sums pairwise, and a half
#          precision tensor is summed in float32.
# Reality: It adds the squares one after the other into float32 accumulators: eight or sixteen of them for float32
#          and bfloat16, one a thread for float16. An accumulator that has come to 2^24 no longer moves when 1
#          is added: the norm of 2^26 float16 ones is 4096, not 8192, without a warning. Of 2^27 values of
#          N(0, 1), as gradients and weights are, a float16 norm is about 20% too small on one thread (10% on
#          two), a float32 norm about 1%. `Tensor.norm`, `torch._foreach_norm` and `clip_grad_norm_` give the same.
#          The sum of the same squares is exact to seven digits. (Of float32 it is reported, pytorch issues 68326
#          and 169237; that float16 loses half of it and depends on the threads is not.)
# Matters: Embeddings and sharded or flattened parameters have that many values. What is clipped, logged or compared
#          by such a norm is off by a factor that depends on the dtype, the length and the number of threads.
#          `dtype=torch.float64` is right, and makes a float64 copy of the whole tensor first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - > "$folder/seen" <<'PYTHON'
import torch

torch.set_num_threads(1)
ones = torch.ones(2**26, dtype=torch.float16)
print("float16 ones, norm:", torch.linalg.vector_norm(ones).item())
print("float16 ones, foreach norm:", torch._foreach_norm([ones])[0].item())
parameter = torch.nn.Parameter(ones)
parameter.grad = ones.clone()
print("float16 ones, clipped by:", torch.nn.utils.clip_grad_norm_([parameter], 1e9).item())
print("float16 ones, norm in float32:", torch.linalg.vector_norm(ones, dtype=torch.float32).item())
del ones, parameter

torch.manual_seed(0)
normal = torch.randn(2**27)
exact = torch.linalg.vector_norm(normal, dtype=torch.float64).item()
half = torch.linalg.vector_norm(normal.half()).item()
print("float16 normal, more than 5% low:", half < 0.95 * exact)
single = torch.linalg.vector_norm(normal).item()
print("float32 normal, more than 0.1% low:", single < 0.999 * exact)
summed = normal.square().sum().sqrt().item()
print("float32 normal, by its sum, within 1e-6:", abs(summed / exact - 1) < 1e-6)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
float16 ones, norm: 4096.0
float16 ones, foreach norm: 4096.0
float16 ones, clipped by: 4096.0
float16 ones, norm in float32: 8192.0
float16 normal, more than 5% low: True
float32 normal, more than 0.1% low: True
float32 normal, by its sum, within 1e-6: True
SEEN
