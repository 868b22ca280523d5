-- Takes, keeps or gives back the place of a role that a run has once: learner, packer, dispatcher, archive.
-- KEYS[3]  lease:<role>  hash  token, holder, until_ms, asked_by: the call that took it
-- ARGV[2]  token of the asker, who keeps its place; 0: it takes the place
-- ARGV[3]  holder: JSON, who it is
-- ARGV[4]  lease_ms; 0 with a token: the place is given back
-- ARGV[5]  role, for the log
-- ARGV[6]  token of a holder that is known to be gone: its lease counts as ended; 0: none
-- ARGV[7]  a name for this call, where it takes the place: said again, after a lost reply, it answers as before
-- Reply: {token}: it holds the place; {0, token, holder, ms until the lease ends}: another does, nothing is changed.
go_on_at_the_limit()
local now = now_ms()
local held = redis.call('HMGET', KEYS[3], 'token', 'holder', 'until_ms')
local token, ends = tonumber(held[1] or '0'), tonumber(held[3] or '0')
local mine, call = tonumber(ARGV[2]), ARGV[7] or ''
if mine == 0 and call ~= '' and redis.call('HGET', KEYS[3], 'asked_by') == call then mine = token end
local taken = mine == 0
if mine > 0 then
  if token > mine then return {0, token, held[2], ends - now} end
elseif token > 0 and ends > now and token ~= tonumber(ARGV[6]) then
  return {0, token, held[2], ends - now}
else
  mine = math.max(now, token + 1) -- by the clock: greater than all before it, also on a server restored from a copy
  emit('lease_taken', 'role', ARGV[5], 'token', mine, 'holder', ARGV[3])
end
redis.call('HSET', KEYS[3], 'token', mine, 'holder', token == mine and held[2] or ARGV[3],
  'until_ms', now + tonumber(ARGV[4]))
if taken then redis.call('HSET', KEYS[3], 'asked_by', call) end
return {mine}
