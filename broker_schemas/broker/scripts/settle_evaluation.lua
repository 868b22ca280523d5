-- Ends a round of evaluation: its results leave the broker, its numbers stay; each round once.
-- KEYS[3]  evaluations         stream  as in commit_match
-- KEYS[4]  evaluation          hash    cursor, asked_by as in issue_requests; settled: policy version of the last round
-- KEYS[5]  evaluation_numbers  stream  numbers, the latest 64: optimizer_step, policy_version, body
-- ARGV[2]  policy version of the round
-- ARGV[3]  optimizer steps done when it was published
-- ARGV[4]  body: its numbers, a map
-- ARGV[5]  how many results it is made of
-- ARGV[6]  number of entries to take away, then the id of each, from ARGV[7]
-- Reply: 1, or 0 when this round, or a later one, was settled before: the entries are taken away all the same.
go_on_at_the_limit()
local MOST_NUMBERS = 64
local ids, bytes = {}, 0
for i = 7, 6 + tonumber(ARGV[6]) do
  local entry = redis.call('XRANGE', KEYS[3], ARGV[i], ARGV[i])[1]
  if entry then
    bytes = bytes + #(fields_of(entry)['body'] or '')
    ids[#ids + 1] = ARGV[i]
  end
end
in_chunks(ids, function(chunk) redis.call('XDEL', KEYS[3], unpack(chunk)) end)
count('bytes', -bytes)
if tonumber(redis.call('HGET', KEYS[4], 'settled') or '0') >= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[4], 'settled', ARGV[2])
redis.call('XADD', KEYS[5], 'MAXLEN', MOST_NUMBERS, '*', 'optimizer_step', ARGV[3], 'policy_version', ARGV[2],
  'body', ARGV[4])
emit('evaluation_settled', 'policy_version', ARGV[2], 'optimizer_step', ARGV[3], 'num_results', ARGV[5],
  'numbers', ARGV[4])
count('evaluations_settled', 1)
return 1
