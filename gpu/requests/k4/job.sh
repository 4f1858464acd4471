# Which part of a Gated DeltaNet layer makes XLA compile slowly: compilations side by side, nothing is run. At most 125 s.
D=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PY=${PY:-python3}
export PYTHONPATH=$PYTHONPATH:$D XLA_PYTHON_CLIENT_PREALLOCATE=false PLAIN=1 PYTHONUNBUFFERED=1
export TF_CPP_MIN_LOG_LEVEL=0
S=${TINY:+4096}; S=${S:-131072}
one() { name=$(echo "$1_$2_$3_$4" | tr -c 'a-z0-9_\n' '-'); timeout ${LIMIT:-110} env XLA_FLAGS="$4" $PY $D/probe.py $1 $2 $3 > $OUT/$name.txt 2>&1; r=$(grep RESULT $OUT/$name.txt || echo "over 110 s or failed: $1 $2 $3"); echo "$r [$4]"; tail -c 20000 $OUT/$name.txt > $OUT/x_$name; mv $OUT/x_$name $OUT/$name.txt; }
(export TF_CPP_VMODULE=hlo_pass_pipeline=1,gpu_compiler=1,nvptx_compiler=1,hlo_pass_fix=1,autotuner_pass=1,autotuner=1,autotuner_cache=1,ir_emitter_unnested=1,llvm_gpu_backend=1
 timeout 110 $PY $D/probe.py base 2 $S > /tmp/vlog.full.$$ 2>&1
 grep RESULT /tmp/vlog.full.$$; cut -c1-170 /tmp/vlog.full.$$ | grep '^[IWE][0-9]' | tail -n 60000 | gzip > $OUT/vlog.txt.gz; wc /tmp/vlog.full.$$) &
(export SAMPLES=/tmp/samples.$$; timeout 100 env LD_PRELOAD=$D/sampler.so $PY $D/probe.py base 2 $S > $OUT/sampled.txt 2>&1; grep RESULT $OUT/sampled.txt; gzip -c /tmp/samples.$$ > $OUT/samples.gz; gzip -c /tmp/samples.$$.maps > $OUT/maps.gz; ls -la $OUT/samples.gz) &
one base 2 $S & one base 2 4096 & one base 4 $S & one base 8 4096 &
one base 2 $S --xla_gpu_autotune_level=0 & one base 2 4096 "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" &
one noinv 2 $S & one solve 2 $S & one levels 2 $S & one norule 2 $S & one noconv+nonorm 2 $S & one norule+noconv+nonorm 2 $S & one transformer 2 $S &
wait
$PY -c "import jax, jaxlib, sys, glob; print(jax.__version__, jaxlib.__version__, sys.version)"; $PY -m pip list 2>/dev/null | grep -i -E "jax|nvidia"
