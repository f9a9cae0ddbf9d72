cd /work/wt/example; export PYTHONPATH=/work/wt/example JAX_NUM_CPU_DEVICES=4
PY=/work/main/.venv/bin/python
OPT="--width 32 --depth 2 --heads 2 --length 16 --batch 4 --steps 4 --save-every 2 --evaluate-every 4 --sample-length 8 --implementation xla --text LICENSE"
rm -rf /tmp/example_*; 
for m in "data=1" "data=4" "data=2,seq=2" "data=2,model=2"; do
 o=/tmp/example_$m; a="--mesh $m"; [ $m = data=1 ] && a=""
 timeout 200 $PY examples/train_lm.py $OPT --out $o $a 2>&1 | tail -25; grep -h -o '"step.*norm[^,]*' $o/metrics.jsonl
done
