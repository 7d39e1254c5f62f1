// The host code of the operators against the stand-in of CUDA's runtime, for tensors of the CPU and as
// operators of mfkernels_emulated; for tests/test_cuda_host.py. All in one, since PyTorch's headers take the
// most time.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/ops/former_call.h"

#define CUDA CPU
#define mfkernels_cuda mfkernels_emulated

#define forward former_block
#include "../../csrc/cuda/former_block.cu"
#undef forward

#define forward token_chain
#define kOp kTokenChain
#include "../../csrc/cuda/token_chain.cu"
#undef forward
#undef kOp

#define forward dynamic_bottleneck
#define kOp kDynamicBottleneck
#include "../../csrc/cuda/dynamic_bottleneck.cu"
