cd /work/wt/example; export PYTHONPATH=$PWD JAX_PLATFORMS=cpu
PY=/work/main/.venv/bin/python
OPT="--width 32 --depth 2 --heads 2 --length 16 --batch 4 --steps 4 --save-every 2 --evaluate-every 4 --sample-length 8 --implementation xla --text LICENSE"
# resumed on another mesh, from step 2 of data=4
for m in "data=2,seq=2" ""; do o=/tmp/example_resumed; rm -rf $o; cp -r /tmp/example_data=4 $o; rm -r $o/checkpoints/4
 JAX_NUM_CPU_DEVICES=4 timeout 100 $PY examples/train_lm.py $OPT --out $o --resume ${m:+--mesh $m} 2>&1 | grep -E "resumed|kda  |rror"; tail -2 $o/metrics.jsonl; done
o=/tmp/example_two; rm -rf $o
for i in 0 1; do JAX_NUM_CPU_DEVICES=2 timeout 120 $PY examples/train_lm.py $OPT --out $o --mesh data=2,seq=2 --coordinator 127.0.0.1:23517 --processes 2 --process $i > /tmp/example_out$i 2>&1 & done; wait
tail -5 /tmp/example_out0; echo; echo second:; tail -20 /tmp/example_out1; grep -h -o '"step.*norm[^,]*' $o/metrics.jsonl; ls $o/checkpoints
