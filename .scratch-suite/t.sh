name=$1; shift
rm -rf /tmp/suite_b_$name
PYTHONPATH=/work/main/.scratch CPUTIME_OUT=/tmp/suite_b_$name /work/wt/cpu timeout 400 /work/main/.venv/bin/python -m pytest -q -p cputime_plugin -m "not gpu and not slow" -p no:cacheprovider "$@" 2>&1 | tail -40
/work/main/.venv/bin/python - /tmp/suite_b_$name <<'P'
import json,glob,sys
def load(d):
    t={}
    for f in glob.glob(d+'/*.jsonl'):
        for l in open(f):
            r=json.loads(l); t[r[0]]=r
    return t
new=load(sys.argv[1]); old={**load('/work/main/.scratch/ci_ct'),**load('/work/main/.scratch/ct8')}
print('NEW',sum(r[1] for r in new.values()),'OLD',sum(old[x][1] for x in new if x in old))
for x,r in sorted(new.items(),key=lambda kv:-abs(kv[1][1]-old.get(kv[0],[0,0])[1]))[:25]: print(round(old.get(x,[0,0])[1],1),round(r[1],1),x,{k[:12]:round(v,1) for k,v in r[3].items()})
P
