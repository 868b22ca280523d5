-- Takes or prolongs the lease of a request while a worker has it, or gives it back to the queue.
-- KEYS[3]  requests  zset  as in issue_requests
-- ARGV[2]  request id
-- ARGV[3]  lease_ms
-- ARGV[4]  1: a worker has it; 0: it waits in the queue again, and no lease runs
-- Reply: 1, or 0 when the request is closed: its records are no longer wanted.
go_on_at_the_limit()
if not redis.call('ZSCORE', KEYS[3], ARGV[2]) then return 0 end
local until_ms = ARGV[4] == '1' and tonumber(ARGV[3]) or look_after(ARGV[3])
redis.call('ZADD', KEYS[3], 'XX', now_ms() + until_ms, ARGV[2])
local key = PREFIX .. 'request:' .. ARGV[2]
if ARGV[4] == '1' then redis.call('HSET', key, 'taken', 1) else redis.call('HDEL', key, 'taken') end
return 1
