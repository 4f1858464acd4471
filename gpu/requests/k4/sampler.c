#define _GNU_SOURCE
#include <execinfo.h>
#include <signal.h>
#include <sys/time.h>
#include <fcntl.h>
#include <unistd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
static int fd = -1;
#include <ucontext.h>
#define WORDS 600
static void on(int s, siginfo_t*i, void*u){ (void)s;(void)i; ucontext_t*c=u; unsigned long*sp=(unsigned long*)c->uc_mcontext.gregs[REG_RSP];
 static __thread unsigned long a[WORDS+3]; struct timespec t; clock_gettime(CLOCK_REALTIME,&t); a[0]=syscall(SYS_gettid); a[1]=t.tv_sec*1000+t.tv_nsec/1000000; a[2]=c->uc_mcontext.gregs[REG_RIP];
 for(int k=0;k<WORDS;k++) a[3+k]=sp[k]; write(fd,a,sizeof a); }
__attribute__((constructor)) static void begin(void){
 const char*p=getenv("SAMPLES"); if(!p) return; unsetenv("LD_PRELOAD"); 
 fd=open(p,O_CREAT|O_TRUNC|O_WRONLY,0644);
 struct sigaction sa; memset(&sa,0,sizeof sa); sa.sa_sigaction=on; sa.sa_flags=SA_RESTART|SA_SIGINFO; sigaction(SIGPROF,&sa,0);
 struct itimerval v={{0,200000},{0,200000}}; setitimer(ITIMER_PROF,&v,0); }
