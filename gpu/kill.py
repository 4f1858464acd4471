import os,signal,sys
for name in sys.argv[1:]:
    for d in os.listdir('/proc'):
        if d.isdigit() and int(d)!=os.getpid():
            try: c=open(f'/proc/{d}/cmdline').read()
            except OSError: continue
            if '/tmp/req/'+name in c or '/tmp/w/'+name in c or '/tmp/q/'+name+'/' in c:
                try: os.kill(int(d),signal.SIGKILL)
                except OSError: pass
