-- Takes places on a rollout server, so that all producers together keep to its cap, and prolongs those held.
-- A holder that dies loses its places when their lease ends.
-- KEYS[3]  server_slots:<base url>  zset  <holder>:<n> -> end of its lease, ms of the server's clock
-- ARGV[2]  holder, a name of its own for each batch
-- ARGV[3]  places wanted; 0: prolong only
-- ARGV[4]  places of the server
-- ARGV[5]  lease_ms
-- Reply: number of places given, 0 to ARGV[3].
go_on_at_the_limit()
local now, wanted = now_ms(), tonumber(ARGV[3])
local lease_end = now + tonumber(ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', '(' .. now)
if wanted == 0 then
  for _, member in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
    if string.sub(member, 1, #ARGV[2] + 1) == ARGV[2] .. ':' then redis.call('ZADD', KEYS[3], lease_end, member) end
  end
  return 0
end
local own = 0 -- said again after a lost reply, it holds them already
for i = 1, wanted do
  if redis.call('ZSCORE', KEYS[3], ARGV[2] .. ':' .. i) then own = own + 1 end
end
local given = math.min(wanted, math.max(0, tonumber(ARGV[4]) - redis.call('ZCARD', KEYS[3]) + own))
for i = 1, given do redis.call('ZADD', KEYS[3], lease_end, ARGV[2] .. ':' .. i) end
return given
