# every call: newest scripts, jobs, data, trees
cp .carry/*.py .carry/*.sh .carry/py-spy /tmp/carry/; cp .carry/jobs.tsv /tmp/q/jobs.new && mv /tmp/q/jobs.new /tmp/q/jobs.tsv
mkdir -p /tmp/q/kill /tmp/q/skip; for n in $(cat .carry/kill.txt 2>/dev/null); do touch /tmp/q/kill/$n; done; for n in $(cat .carry/skip.txt 2>/dev/null); do touch /tmp/q/skip/$n; done
[ -f .carry/sizes.json ] && cp .carry/sizes.json /tmp/q/sizes.json
for f in .carry?/*.xz .carry?/*.bz3; do [ -f $f ] && cp $f /tmp/data/$(basename $f).part && mv /tmp/data/$(basename $f).part /tmp/data/$(basename $f); done; true
cp .carry/configs/* /tmp/src/configs/ 2>/dev/null; true
# .carry/tree_NAME/...: files that replace those of the tree, in a copy /tmp/src_NAME made once
for d in .carry/tree_*; do [ -d $d ] || continue; n=${d#.carry/tree_}; [ -d /tmp/src_$n ] && continue; mkdir -p /tmp/src_$n /tmp/src/runs /tmp/src/results; cp -r benchmarks configs tlinformer_jax tools tests pyproject.toml docs launch /tmp/src_$n/; cp -r $d/* /tmp/src_$n/; ln -sfn /tmp/data /tmp/src_$n/books; ln -sfn /tmp/src/runs /tmp/src_$n/runs; ln -sfn /tmp/src/results /tmp/src_$n/results; touch /tmp/src_$n/ready; done; true
