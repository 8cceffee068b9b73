#!/bin/sh
# Builds csrc/cuda with the emulator into OUT/libemulated.so, whose kernels serve CPU tensors: build.sh OUT TORCH_DIR
set -e
out=$1 torch=$2 here=$(dirname "$0") csrc=$(dirname "$0")/../../csrc
sanitize=${SANITIZE:-"-fsanitize=alignment,bounds,signed-integer-overflow -fno-sanitize-recover=all"}
flags="-std=c++17 -O1 -g -fPIC -w $sanitize -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000ULL"
for source in "$csrc"/cuda/*.cu "$csrc"/cuda/*.cpp "$here"/emulator.cpp; do
  # The dispatch key is the one word that differs.
  echo "sed 's/(rlhf_kernels, CUDA, m)/(rlhf_kernels, CPU, m)/' $source |" \
    "${CXX:-g++} $flags -I$here -I$csrc -I$torch/include -x c++ - -c -o $out/$(basename "$source").o"
done | xargs -P 2 -d '\n' -I{} sh -c '{}'
link="-shared $sanitize -L$torch/lib -Wl,--no-as-needed -ltorch_cpu"
${CXX:-g++} "$out"/*.o -o "$out/libemulated.so" $link
