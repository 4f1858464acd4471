# every call: newest scripts, jobs, data
cp .carry/*.py .carry/*.sh .carry/py-spy /tmp/carry/; cp .carry/jobs.tsv /tmp/q/jobs.new && mv /tmp/q/jobs.new /tmp/q/jobs.tsv
mkdir -p /tmp/q/kill /tmp/q/skip; for n in $(cat .carry/kill.txt 2>/dev/null); do touch /tmp/q/kill/$n; done; for n in $(cat .carry/skip.txt 2>/dev/null); do touch /tmp/q/skip/$n; done
[ -f .carry/sizes.json ] && cp .carry/sizes.json /tmp/q/sizes.json
for f in .carry?/*.xz .carry?/*.bz3; do [ -f $f ] && cp $f /tmp/data/$(basename $f).part && mv /tmp/data/$(basename $f).part /tmp/data/$(basename $f); done; true
cp .carry/configs/* /tmp/src/configs/ 2>/dev/null; true
[ -d .carry/treef ] && [ ! -d /tmp/srcf ] && { mkdir /tmp/srcf; cp -r benchmarks configs tlinformer_jax tools tests pyproject.toml docs launch /tmp/srcf/; cp -r .carry/treef/* /tmp/srcf/; ln -sfn /tmp/data /tmp/srcf/books; mkdir -p /tmp/src/runs /tmp/src/results; ln -sfn /tmp/src/runs /tmp/srcf/runs; ln -sfn /tmp/src/results /tmp/srcf/results; }; true
[ -d .carry/treeg ] && [ ! -d /tmp/srcg ] && { mkdir /tmp/srcg; cp -r benchmarks configs tlinformer_jax tools tests pyproject.toml docs launch /tmp/srcg/; ln -sfn /tmp/data /tmp/srcg/books; }; true
