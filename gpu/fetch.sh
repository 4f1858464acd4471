# every call: newest scripts, jobs, requests, data
cp .carry/*.py .carry/*.sh /tmp/carry/; cp .carry/jobs.tsv /tmp/q/jobs.new && mv /tmp/q/jobs.new /tmp/q/jobs.tsv
[ -d .carry/req ] && cp -r .carry/req/. /tmp/req/ 2>/dev/null || { mkdir -p /tmp/req; [ -d .carry/req ] && cp -r .carry/req/. /tmp/req/; true; }
for f in .carry?/*.xz; do [ -f $f ] && cp $f /tmp/data/$(basename $f).part && mv /tmp/data/$(basename $f).part /tmp/data/$(basename $f); done; true
