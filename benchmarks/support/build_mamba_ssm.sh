#!/usr/bin/env bash
# Builds causal-conv1d and mamba-ssm from their source distributions, for benchmarks/peer_mamba_ssm.py, without a network.
#
#     bash benchmarks/support/build_mamba_ssm.sh SDISTS DEST
#     PYTHONPATH=DEST python benchmarks/peer_mamba_ssm.py ...
#
# SDISTS holds causal_conv1d-*.tar.gz and mamba_ssm-*.tar.gz (and wheels of what is missing on the machine):
#
#     pip download --no-binary :all: --no-deps --no-build-isolation -d SDISTS causal-conv1d==1.6.1 mamba-ssm==2.3.2.post1
#
# (with MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE where there is no nvcc). The machine needs nvcc of
# torch's CUDA version, a C++ compiler, ninja, setuptools and wheel.
#
# Both setup.py name nine architectures in their code and compile every kernel for three data types, forwards and
# backwards, which takes long. The peer check runs float32 forwards on one GPU: here the sources are cut to that, one
# architecture, float32, forward, real A. Anything else raises an error. The kernels that remain are unchanged.
set -euo pipefail

sdists=$(realpath "$1")
dest=$(realpath -m "$2")
work="$dest.build"
rm -rf "$work" "$dest"
mkdir -p "$work" "$dest"
for sdist in "$sdists"/causal_conv1d-*.tar.gz "$sdists"/mamba_ssm-*.tar.gz; do
    tar -xzf "$sdist" -C "$work"
done
conv=$(echo "$work"/causal_conv1d-*/)
ssm=$(echo "$work"/mamba_ssm-*/)

# The architecture comes from TORCH_CUDA_ARCH_LIST instead of nine flags in setup.py; no kernels of the backward pass.
sed -i -E -e 's/cc_flag\.append\("(-gencode|arch=[^"]*)"\)/pass/' -e '/"csrc\/.*_bwd[^"]*\.cu",/d' \
    -e '/"csrc\/.*_fwd_(fp16|bf16)\.cu",/d' "$conv/setup.py" "$ssm/setup.py"
# Only the float32 kernels are instantiated, and a call of another raises.
refuse='TORCH_CHECK(false, "built by build_mamba_ssm.sh for float32 forward passes only");'
sed -i -E -e '/^template void .*(at::Half|at::BFloat16|complex_t)/d' "$conv"/csrc/*.cu "$ssm"/csrc/selective_scan/*.cu
sed -i -E -e "s/using (input_t|weight_t) = (at::Half|at::BFloat16|c10::complex<float>);/$refuse using \1 = float;/" \
    -e "s/(causal_conv1d_bwd_cuda|causal_conv1d_channellast_bwd_cuda|selective_scan_bwd_cuda)<input_t, weight_t>\(.*\);/$refuse/" \
    "$conv/csrc/causal_conv1d.cpp" "$ssm/csrc/selective_scan/selective_scan.cpp"

python=$(python3 -c 'import sys; print(sys.executable)')
PATH="$(dirname "$python"):$PATH"
export PATH
# Headers of CUDA libraries (cuBLAS, cuSPARSE, ...) where the compiler comes without them.
for include in $("$python" -c 'import glob, sysconfig; print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/cu1*/include"))'); do
    CPATH="${CPATH:+$CPATH:}$include"
done
export CPATH="${CPATH:-}"
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
export TORCH_CUDA_ARCH_LIST
# Neither looks for a finished wheel on the network.
export CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-8}"

install() {
    "$python" -m pip install --no-index --no-deps --no-build-isolation --target "$dest" --upgrade "$@"
}
for wheel in "$sdists"/einops-*.whl; do
    if [ -e "$wheel" ]; then install --quiet "$wheel"; fi
done

started=$SECONDS
install -v "$conv" >"$work/causal_conv1d.log" 2>&1 &
conv_build=$!
failed=0
install -v "$ssm" >"$work/mamba_ssm.log" 2>&1 || { failed=1; grep -iE -A3 'error|fatal' "$work/mamba_ssm.log" | tail -40; }
wait "$conv_build" || { failed=1; grep -iE -A3 'error|fatal' "$work/causal_conv1d.log" | tail -40; }
[ "$failed" = 0 ] || { echo "the build failed; logs: $work/*.log" >&2; exit 1; }
echo "built for sm $TORCH_CUDA_ARCH_LIST in $((SECONDS - started)) s"
PYTHONPATH="$dest" "$python" -c '
import causal_conv1d, mamba_ssm, torch
print("causal_conv1d", causal_conv1d.__version__, "mamba_ssm", mamba_ssm.__version__, "torch", torch.__version__)'
