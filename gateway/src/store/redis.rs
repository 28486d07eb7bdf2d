//! (IO) The store in a Redis or Valkey. Keys are `penstock:<gateway>:{<tag>}:<part>`: what belongs together is in one
//! slot of a cluster, and each script touches one slot only. Times are the server's, so that replicas need not agree
//! on theirs. A cluster is used as one server is, but for [`Redis::settle`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use redis::{FromRedisValue, Script};

use super::connection::{Ask, Connection};
use super::{Durability, Error, Expect, Key, Leased, OpenError, Piece, QUEUE_KEPT, Versioned};

/// The tag of everything about the queue.
const QUEUE: &str = "queue";
/// How long the server may take to write its log: with `appendfsync everysec` it does once a second.
const SETTLE_MS: u64 = 3_000;
/// How long what is written before a wait is kept.
const MARK_KEPT: Duration = Duration::from_mins(1);
/// Tags of a cluster that nobody has settled: more are settled at once.
const MAX_UNSETTLED: usize = 1_024;
/// How many servers of a cluster are written to at one time before it is settled.
const MARKS_AT_ONCE: usize = 16;
/// How long it is taken to be true whether the server evicts.
const ASK_AGAIN: Duration = Duration::from_secs(30);

static PUT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local now = redis.call('HGET', KEYS[1], 'version') or '0'
         if ARGV[1] ~= '' and ARGV[1] ~= now then return 0 end
         redis.call('HSET', KEYS[1], 'version', now + 1, 'value', ARGV[2])
         redis.call('PEXPIRE', KEYS[1], ARGV[3])
         return now + 1",
    )
});

static LISTED: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local newest, from = ARGV[2] == '1', 0
         if ARGV[1] ~= '' then
           local rank = redis.call(newest and 'ZREVRANK' or 'ZRANK', KEYS[1], ARGV[1])
           if not rank then return {} end
           from = rank + 1
         end
         return redis.call(newest and 'ZREVRANGE' or 'ZRANGE', KEYS[1], from, from + ARGV[3] - 1)",
    )
});

/// Before each script of the queue: its keys are the class's jobs by the time from which they may be taken, each job's
/// count of attempts and owner (`2:owner`), and the classes.
const QUEUE_KEYS: &str = "local due, jobs, classes = KEYS[1], KEYS[2], KEYS[3]
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local function attempts(job)
      return tonumber(string.match(redis.call('HGET', jobs, job) or '', '^%d+') or '0')
    end
    local function is_of(job, owner)
      return string.match(redis.call('HGET', jobs, job) or '', ':(.*)$') == owner
    end
    ";

fn queue_script(code: &str) -> Script {
    Script::new(&format!("{QUEUE_KEYS}{code}"))
}

static ENQUEUE: LazyLock<Script> = LazyLock::new(|| {
    queue_script(
        "if redis.call('HLEN', jobs) >= tonumber(ARGV[3]) then return 0 end
         redis.call('ZADD', due, now, ARGV[1])
         redis.call('HSET', jobs, ARGV[1], '0:')
         redis.call('SADD', classes, ARGV[2])
         for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[4]) end
         return 1",
    )
});

static LEASE: LazyLock<Script> = LazyLock::new(|| {
    queue_script(
        "local job = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, 1)[1]
         if not job then
           if redis.call('ZCARD', due) == 0 then redis.call('SREM', classes, ARGV[1]) end
           return {}
         end
         local attempt = attempts(job) + 1
         redis.call('HSET', jobs, job, attempt .. ':' .. ARGV[2])
         redis.call('ZADD', due, now + ARGV[3], job)
         return {job, tostring(attempt)}",
    )
});

static RENEW: LazyLock<Script> = LazyLock::new(|| {
    queue_script(
        "if not is_of(ARGV[1], ARGV[2]) then return 0 end
         redis.call('ZADD', due, now + ARGV[3], ARGV[1])
         return 1",
    )
});

static RELEASE: LazyLock<Script> = LazyLock::new(|| {
    queue_script(
        "if not is_of(ARGV[1], ARGV[2]) then return 0 end
         local count = attempts(ARGV[1])
         if ARGV[4] ~= '1' then count = math.max(count - 1, 0) end
         redis.call('HSET', jobs, ARGV[1], count .. ':')
         redis.call('ZADD', due, now + ARGV[3], ARGV[1])
         return 1",
    )
});

/// A share is a hash of what ends in each hour; it lives as long as its last one.
static CLAIM: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local now = tonumber(redis.call('TIME')[1])
         local held, last = 0, tonumber(ARGV[2])
         local hours = redis.call('HGETALL', KEYS[1])
         for i = 1, #hours, 2 do
           local hour = tonumber(hours[i])
           if hour * 3600 <= now then
             redis.call('HDEL', KEYS[1], hours[i])
           else
             held = held + tonumber(hours[i + 1])
             last = math.max(last, hour)
           end
         end
         if held + tonumber(ARGV[1]) > tonumber(ARGV[3]) then return 0 end
         redis.call('HINCRBY', KEYS[1], ARGV[2], ARGV[1])
         redis.call('EXPIREAT', KEYS[1], last * 3600)
         return 1",
    )
});

static UNCLAIM: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local left = tonumber(redis.call('HGET', KEYS[1], ARGV[2]) or '0') - ARGV[1]
         if left > 0 then
           redis.call('HSET', KEYS[1], ARGV[2], string.format('%.0f', left))
         else
           redis.call('HDEL', KEYS[1], ARGV[2])
         end",
    )
});

/// A server.
pub struct Redis {
    connection: Connection,
    space: String,
    barrier: tokio::sync::Mutex<()>,
    /// Barriers that have begun, and the last one that has ended, with what it found.
    begun: AtomicU64,
    ended: Mutex<(u64, Durability)>,
    /// Tags of a cluster of which something was written since it was settled.
    unsettled: Mutex<BTreeSet<String>>,
    /// Whether the server evicts, and when it said so.
    evicts: Mutex<Option<(Instant, bool)>>,
}

impl Redis {
    pub(super) fn open(url: &str, password: Option<&Path>, space: &str) -> Result<Self, OpenError> {
        Ok(Self {
            connection: Connection::open(url, password)?,
            space: space.to_owned(),
            barrier: tokio::sync::Mutex::default(),
            begun: AtomicU64::new(0),
            ended: Mutex::new((0, Durability::Durable)),
            unsettled: Mutex::default(),
            evicts: Mutex::default(),
        })
    }

    /// Asks for a change of what has this tag.
    async fn change<T: FromRedisValue>(&self, tag: &str, what: Ask<'_>) -> Result<T, Error> {
        let told = self.connection.ask(what).await;
        if self.connection.is_cluster() {
            let count = {
                let mut unsettled = self.unsettled();
                unsettled.insert(tag.to_owned());
                unsettled.len()
            };
            if count > MAX_UNSETTLED {
                self.settle().await?;
            }
        }
        told
    }

    fn unsettled(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.unsettled
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, key: &Key) -> String {
        self.name(&key.tag, key.part)
    }

    fn name(&self, tag: &str, part: &str) -> String {
        format!("penstock:{}:{{{tag}}}:{part}", self.space)
    }

    pub(super) async fn get(&self, key: &Key) -> Result<Option<Versioned>, Error> {
        let mut command = redis::cmd("HMGET");
        command.arg(self.key(key)).arg("version").arg("value");
        let (version, value): (Option<u64>, Option<Vec<u8>>) =
            self.connection.ask(Ask::Command(&command)).await?;
        Ok(version.zip(value).map(|(version, value)| Versioned {
            version,
            value: Bytes::from(value),
        }))
    }

    pub(super) async fn get_at(&self, key: &Key) -> Result<(Option<Versioned>, u64), Error> {
        type Found = (Option<u64>, Option<Vec<u8>>);
        let mut pipeline = redis::pipe();
        let read = pipeline.cmd("HMGET").arg(self.key(key));
        read.arg("version").arg("value").cmd("TIME");
        let ((version, value), (s, us)): (Found, (u64, u64)) =
            self.connection.ask(Ask::Pipeline(&pipeline)).await?;
        let found = version.zip(value).map(|(version, value)| Versioned {
            version,
            value: Bytes::from(value),
        });
        Ok((found, s * 1_000 + us / 1_000))
    }

    pub(super) async fn put(
        &self,
        key: &Key,
        value: Bytes,
        expect: Expect,
        ttl: Duration,
    ) -> Result<Option<u64>, Error> {
        let expected = match expect {
            Expect::Any => String::new(),
            Expect::Version(version) => version.to_string(),
        };
        let mut call = PUT.prepare_invoke();
        call.key(self.key(key));
        call.arg(expected).arg(&value[..]).arg(ms(ttl));
        let version: u64 = self.change(&key.tag, Ask::Script(&call)).await?;
        Ok((version > 0).then_some(version))
    }

    pub(super) async fn remove(&self, keys: Vec<Key>) -> Result<(), Error> {
        let tag = keys.first().map_or("", |key| &key.tag);
        let names: Vec<String> = keys.iter().map(|key| self.key(key)).collect();
        let mut command = redis::cmd("UNLINK");
        command.arg(names);
        self.change(tag, Ask::Command(&command)).await
    }

    pub(super) async fn write(
        &self,
        log: &Key,
        pieces: Vec<Piece>,
        ttl: Duration,
    ) -> Result<(), Error> {
        let key = self.key(log);
        let mut pipeline = redis::pipe();
        let set = pipeline.cmd("HSET").arg(&key);
        for (number, piece) in &pieces {
            set.arg(*number).arg(&piece[..]);
        }
        pipeline.ignore();
        pipeline.cmd("PEXPIRE").arg(&key).arg(ms(ttl)).ignore();
        self.change(&log.tag, Ask::Pipeline(&pipeline)).await
    }

    pub(super) async fn pieces(
        &self,
        log: &Key,
        from: u64,
        most: u64,
    ) -> Result<Vec<Piece>, Error> {
        let numbers: Vec<u64> = (from..from.saturating_add(most)).collect();
        let mut command = redis::cmd("HMGET");
        command.arg(self.key(log)).arg(&numbers);
        let found: Vec<Option<Vec<u8>>> = self.connection.ask(Ask::Command(&command)).await?;
        let pieces = numbers.into_iter().zip(found);
        Ok(pieces
            .filter_map(|(number, piece)| Some((number, Bytes::from(piece?))))
            .collect())
    }

    pub(super) async fn enlist(
        &self,
        list: &Key,
        member: &str,
        at_ms: u64,
        kept: Duration,
    ) -> Result<(), Error> {
        let key = self.key(list);
        let oldest = at_ms.saturating_sub(ms(kept));
        let mut pipeline = redis::pipe();
        pipeline
            .cmd("ZADD")
            .arg(&key)
            .arg(at_ms)
            .arg(member)
            .ignore();
        pipeline
            .cmd("ZREMRANGEBYSCORE")
            .arg(&key)
            .arg("-inf")
            .arg(format!("({oldest}"))
            .ignore();
        pipeline.cmd("PEXPIRE").arg(&key).arg(ms(kept)).ignore();
        self.change(&list.tag, Ask::Pipeline(&pipeline)).await
    }

    pub(super) async fn unlist(&self, list: &Key, member: &str) -> Result<(), Error> {
        let mut command = redis::cmd("ZREM");
        command.arg(self.key(list)).arg(member);
        self.change(&list.tag, Ask::Command(&command)).await
    }

    pub(super) async fn listed(
        &self,
        list: &Key,
        after: Option<&str>,
        newest_first: bool,
        most: usize,
    ) -> Result<Vec<String>, Error> {
        let mut call = LISTED.prepare_invoke();
        call.key(self.key(list));
        call.arg(after.unwrap_or_default());
        call.arg(u8::from(newest_first)).arg(most);
        self.connection.ask(Ask::Script(&call)).await
    }

    /// A script of the queue with its keys.
    fn queue<'a>(&self, script: &'a Script, class: &str) -> redis::ScriptInvocation<'a> {
        let mut call = script.prepare_invoke();
        call.key(self.name(QUEUE, &format!("due:{class}")));
        call.key(self.name(QUEUE, "jobs"));
        call.key(self.name(QUEUE, "classes"));
        call
    }

    pub(super) async fn enqueue(&self, class: &str, job: &str, most: u64) -> Result<(), Error> {
        let mut call = self.queue(&ENQUEUE, class);
        call.arg(job).arg(class).arg(most).arg(ms(QUEUE_KEPT));
        let entered: bool = self.change(QUEUE, Ask::Script(&call)).await?;
        if entered { Ok(()) } else { Err(Error::Full) }
    }

    pub(super) async fn classes(&self) -> Result<Vec<String>, Error> {
        let mut command = redis::cmd("SMEMBERS");
        command.arg(self.name(QUEUE, "classes"));
        self.connection.ask(Ask::Command(&command)).await
    }

    pub(super) async fn lease(
        &self,
        class: &str,
        owner: &str,
        lease: Duration,
    ) -> Result<Option<Leased>, Error> {
        let mut call = self.queue(&LEASE, class);
        call.arg(class).arg(owner).arg(ms(lease));
        let found: Vec<String> = self.change(QUEUE, Ask::Script(&call)).await?;
        let mut found = found.into_iter();
        Ok(found.next().zip(found.next()).map(|(job, attempt)| Leased {
            job,
            attempt: attempt.parse().unwrap_or(u32::MAX),
        }))
    }

    pub(super) async fn renew(
        &self,
        class: &str,
        job: &str,
        owner: &str,
        lease: Duration,
    ) -> Result<bool, Error> {
        let mut call = self.queue(&RENEW, class);
        call.arg(job).arg(owner).arg(ms(lease));
        self.change(QUEUE, Ask::Script(&call)).await
    }

    pub(super) async fn release(
        &self,
        class: &str,
        job: &str,
        owner: &str,
        after: Duration,
        counted: bool,
    ) -> Result<(), Error> {
        let mut call = self.queue(&RELEASE, class);
        call.arg(job)
            .arg(owner)
            .arg(ms(after))
            .arg(u8::from(counted));
        self.change(QUEUE, Ask::Script(&call)).await
    }

    pub(super) async fn withdraw(&self, class: &str, job: &str) -> Result<bool, Error> {
        let mut pipeline = redis::pipe();
        pipeline.atomic();
        pipeline
            .cmd("ZREM")
            .arg(self.name(QUEUE, &format!("due:{class}")))
            .arg(job)
            .ignore();
        pipeline.cmd("HDEL").arg(self.name(QUEUE, "jobs")).arg(job);
        let (was_there,) = self.change(QUEUE, Ask::Pipeline(&pipeline)).await?;
        Ok(was_there)
    }

    pub(super) async fn claim(
        &self,
        share: &Key,
        amount: u64,
        hour: u64,
        most: u64,
    ) -> Result<bool, Error> {
        let mut call = CLAIM.prepare_invoke();
        call.key(self.key(share));
        call.arg(amount).arg(hour).arg(most);
        self.change(&share.tag, Ask::Script(&call)).await
    }

    pub(super) async fn unclaim(&self, share: &Key, amount: u64, hour: u64) -> Result<(), Error> {
        let mut call = UNCLAIM.prepare_invoke();
        call.key(self.key(share));
        call.arg(amount).arg(hour);
        self.change(&share.tag, Ask::Script(&call)).await
    }

    /// One wait for the disk serves all who came before it began: the server writes its log in order.
    pub(super) async fn settle(&self) -> Result<Durability, Error> {
        let after = self.begun.load(Ordering::Acquire);
        let _alone = self.barrier.lock().await;
        let (ended, durability) = *self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended > after {
            return Ok(durability);
        }
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let durability = self.waited(number).await?;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        *ended = (number, durability);
        Ok(durability)
    }

    /// Servers wait for a client's own writes only, so this client writes something first: in a cluster wherever
    /// something was written.
    async fn waited(&self, number: u64) -> Result<Durability, Error> {
        let mut wait = redis::cmd("WAITAOF");
        wait.arg(1).arg(0).arg(SETTLE_MS);
        let waited: Result<Vec<(u64, u64)>, Error> = if self.connection.is_cluster() {
            let mut settling = Settling {
                tags: std::mem::take(&mut *self.unsettled()),
                of: self,
            };
            self.mark(&settling.tags, number).await?;
            let waited = self.connection.wait(Ask::Each(&wait)).await;
            if matches!(waited, Ok(_) | Err(Error::Server(_))) {
                settling.tags.clear();
            }
            waited
        } else {
            let mut pipeline = redis::pipe();
            pipeline.add_command(self.mark_of(QUEUE, number)).ignore();
            pipeline.add_command(wait);
            self.connection.wait(Ask::Pipeline(&pipeline)).await
        };
        let durability = match waited {
            Ok(servers) if servers.iter().all(|(disks, _replicas)| *disks > 0) => {
                Durability::Durable
            }
            Ok(_) => Durability::NotDurable,
            // Redis before 7.2, or no log at all.
            Err(Error::Server(_)) => self.as_configured().await?,
            Err(err) => return Err(err),
        };
        // What is on the disk is gone from there, too, once it is evicted.
        if durability == Durability::Durable && self.evicts().await? {
            return Ok(Durability::NotDurable);
        }
        Ok(durability)
    }

    fn mark_of(&self, tag: &str, number: u64) -> redis::Cmd {
        let mut set = redis::cmd("SET");
        let mark = self.name(tag, "settled");
        set.arg(mark).arg(number).arg("PX").arg(ms(MARK_KEPT));
        set
    }

    /// Writes to each server of a cluster that has one of these tags.
    async fn mark(&self, tags: &BTreeSet<String>, number: u64) -> Result<(), Error> {
        let marks: Vec<redis::Cmd> = tags.iter().map(|tag| self.mark_of(tag, number)).collect();
        let writes = marks.into_iter().map(|set| async move {
            let written: Result<(), Error> = self.connection.wait(Ask::Command(&set)).await;
            written
        });
        let writes = stream::iter(writes).buffer_unordered(MARKS_AT_ONCE);
        writes.try_collect::<()>().await
    }

    /// With `appendfsync always` a server writes its log before it answers.
    async fn as_configured(&self) -> Result<Durability, Error> {
        let mut command = redis::cmd("CONFIG");
        command.arg("GET").arg("append*");
        let told: Result<Vec<BTreeMap<String, String>>, Error> =
            self.connection.ask(Ask::Each(&command)).await;
        let is_durable = |server: &BTreeMap<String, String>| {
            let is = |name: &str, value: &str| server.get(name).is_some_and(|is| is == value);
            is("appendonly", "yes") && is("appendfsync", "always")
        };
        match told {
            Ok(servers) if servers.iter().all(is_durable) => Ok(Durability::Durable),
            // Or where it may not be asked.
            Ok(_) | Err(Error::Server(_)) => Ok(Durability::NotDurable),
            Err(err) => Err(err),
        }
    }

    /// Whether the server throws away what it holds when it is full. All that is kept here has an end of life, so the
    /// policies that evict only what has one do, too. One that does not tell is taken not to.
    async fn evicts(&self) -> Result<bool, Error> {
        let now = penstock_shell::clock::now();
        let known = *self.evicts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, evicts)) = known
            && now.saturating_duration_since(at) < ASK_AGAIN
        {
            return Ok(evicts);
        }
        let mut command = redis::cmd("INFO");
        command.arg("memory");
        let told: Vec<String> = match self.connection.ask(Ask::Each(&command)).await {
            Ok(told) => told,
            Err(Error::Server(_)) => Vec::new(),
            Err(err) => return Err(err),
        };
        let evicts = told.iter().any(|server| evicts(server));
        *self.evicts.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, evicts));
        Ok(evicts)
    }
}

/// Tags that are being settled: unsettled again, if that does not come to its end.
struct Settling<'a> {
    tags: BTreeSet<String>,
    of: &'a Redis,
}

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        self.of.unsettled().append(&mut self.tags);
    }
}

/// What a server says of its memory.
fn evicts(told: &str) -> bool {
    let says = |name: &str| {
        let mut lines = told.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    let is_bounded = says("maxmemory").is_some_and(|bytes| bytes != "0");
    is_bounded && says("maxmemory_policy").is_some_and(|is| is != "noeviction")
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
