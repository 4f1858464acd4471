# unpack the newest q.tgz; results of requests for the helpers
n=$(ls -d /work/.device/*/ | sed 's#.*device/##; s#/##' | sort -n | tail -1); mkdir -p /work/scratch/q; tar xzf /work/.device/$n/q.tgz -C /work/scratch/q
for d in /work/scratch/gpu/requests/*; do r=$(basename $d); [ -d /work/scratch/q/$r ] && mkdir -p /work/scratch/gpu/results/$r && cp -r /work/scratch/q/$r/. /work/scratch/gpu/results/$r/; done
rm -rf /work/main/.carry/req; mkdir -p /work/main/.carry/req; cp -r /work/scratch/gpu/requests/. /work/main/.carry/req/; sed -i 's/LENGTH=${LENGTH:-76000000}/LENGTH=${LENGTH:-30000000}/; s/FRACTION=0.95/FRACTION=0.504/' /work/main/.carry/req/k1-longest/job.sh; ls /work/main/.carry/req /work/scratch/gpu/results | tr '\n' ' '; date
