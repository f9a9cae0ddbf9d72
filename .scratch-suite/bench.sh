# bench.sh NAME [ENV...]: runs the handful and prints CPU
name=$1; shift
rm -rf /tmp/suite_b_$name
env "$@" PYTHONPATH=/work/main/.scratch CPUTIME_OUT=/tmp/suite_b_$name /work/wt/cpu timeout 500 /work/main/.venv/bin/python -m pytest -q -p cputime_plugin -p no:cacheprovider \
 'tests/test_abc.py::test_formulas_and_segments[xla]' 'tests/contract/test_values.py::test_values_and_gradients[gsa-xla-bfloat16]' 'tests/contract/test_values.py::test_values_and_gradients[log_linear-xla-bfloat16]' tests/models/test_latent_attention.py 'tests/contract/test_transforms.py::test_sharded_under_jit[kda-xla-2 by 2]' 'tests/contract/test_over_time.py::test_packed_is_the_unsharded[kda-xla]' 'tests/contract/test_export.py::test_steps_and_gradients_of_any_batch_and_length[path-xla]' 2>&1 | tail -3
/work/main/.venv/bin/python /tmp/jlatools/show.py /tmp/suite_b_$name 0 12 | sed "s/^/$name: /"
