#!/bin/sh
# Every GPU figure of speed.md: sh benchmarks/gpu.sh FOLDER; PYTHON names an interpreter with JAX for CUDA and PyTorch.
# One JSON file for each command; what fails says so in its .log and the rest goes on.
out=${1:-runs/gpu}
python=${PYTHON:-.venv-parity/bin/python}
mkdir -p "$out"
"$python" -c "import jax; assert jax.default_backend() == 'gpu'" || { echo "JAX of $python sees no GPU" >&2; exit 2; }

bench() { # NAME ARGUMENTS..
  name=$1
  shift
  echo "== $name: $*"
  "$python" -m mljax.bench "$@" --json="$out/$name.json" 2>&1 | tee "$out/$name.log"
}

resnet="--config=configs/baseline.py:voc2007 --dtype=bfloat16"
speed="--only=train,infer --against=torch"

# Largest batches first: the others are chosen by them. Beside PyTorch both sides share the memory.
bench resnet101_largest $resnet --find-batch
bench resnet101_largest_infer $resnet --find-batch --only=infer
for size in 64 128 192; do
  bench resnet101_$size $resnet --batch=$size --fold --hlo="$out/resnet101_$size" $speed
done
bench query2label --config=configs/query2label.py:voc2007 --dtype=bfloat16 --batch=64 --fold $speed
bench cmsg --config=configs/cmsg.py:voc2007 --dtype=bfloat16 --batch=64 --fold $speed
bench swin_l --config=configs/query2label.py:coco2014,swin_l --dtype=bfloat16 --batch=32 $speed
bench head --config=configs/query2label.py:voc_resplit --batch=64 $speed
bench head_half --config=configs/query2label.py:voc_resplit --dtype=bfloat16 --batch=64 $speed

# Where a run's time goes with real JPEG files, what the trainer costs, compile time with and without the cache, a trace.
XLA_PYTHON_CLIENT_PREALLOCATE=false bench loop $resnet --batch=128 --only=loop,compile --profile="$out/trace"
bench overhead $resnet --batch=32 --only=overhead --rounds=9

# Flags of XLA that may help, and rematerialisation, against the first of these.
bench flags_none $resnet --batch=128 --only=train
for flag in xla_gpu_enable_latency_hiding_scheduler=true xla_gpu_enable_triton_gemm=false xla_gpu_autotune_level=4 \
  xla_gpu_enable_command_buffer= ; do
  XLA_FLAGS="$XLA_FLAGS --$flag" bench "flags_${flag%%=*}" $resnet --batch=128 --only=train
done
bench remat $resnet --config.backbone.remat=True --batch=128 --only=train

# How cost grows.
bench scale_batch $resnet --scale=batch --values=1,4,16,64,256 --only=train,infer --out="$out"
bench scale_resolution $resnet --batch=32 --scale=resolution --only=train,infer --out="$out"
for config in cmsg query2label sst ml_decoder; do
  bench "scale_labels_$config" --config=configs/$config.py:voc_resplit --batch=64 --scale=labels --only=train,infer \
    --out="$out/$config"
done
