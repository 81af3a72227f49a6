using System.Reflection;
using System.Security;
using System.Text.Json;
using NUnit.Framework.Api;
using NUnit.Framework.Interfaces;
using NUnit.Framework.Internal;

namespace Vmm.Tests.Lab;

/// <summary>
/// Runs this folder's tests without a test host, for the lab: <c>dotnet Vmm.Tests.dll RECORDS [FILTER]</c>. It prints a line for each test, and
/// writes a JSON record for each start and end to RECORDS, so that the lab can name the test that a crash interrupted.
/// </summary>
internal static class LabMain
{
    public static int Main(string[] arguments)
    {
        if (LabOtherProcess.Run(arguments) is { } code) return code;
        using var records = new StreamWriter(arguments[0]) { AutoFlush = true };
        // NUnit replaces Console.Out, so open stdout directly.
        using var console = new StreamWriter(Console.OpenStandardOutput()) { AutoFlush = true };
        var runner = new NUnitTestAssemblyRunner(new DefaultTestAssemblyBuilder());
        runner.Load(Assembly.GetExecutingAssembly(), new Dictionary<string, object>
        {
            [NUnit.FrameworkPackageSettings.LOAD] = new[] { "Vmm.Tests.Lab" },
            // Run one test at a time, because all share one processor and the same devices.
            [NUnit.FrameworkPackageSettings.NumberOfTestWorkers] = 0,
        });
        string[] parts = arguments.Length > 1 ? arguments[1].Split(',', StringSplitOptions.RemoveEmptyEntries) : [];
        string names = string.Concat(parts.Select(static p => $"<test re='1'>{SecurityElement.Escape(System.Text.RegularExpressions.Regex.Escape(p))}</test>"));
        ITestResult result = runner.Run(new Listener(console, records), TestFilter.FromXml(parts.Length == 0 ? $"<filter><not><cat>{LabFixture.Slow}</cat></not></filter>" : $"<filter><or>{names}</or></filter>"));
        records.WriteLine(JsonSerializer.Serialize(new { @event = "done" }));
        return result.FailCount == 0 && result.PassCount > 0 ? 0 : 1;
    }

    private sealed class Listener(TextWriter console, TextWriter records) : ITestListener
    {
        public void TestStarted(ITest test)
        {
            if (!test.IsSuite) Record(new { @event = "start", name = test.FullName });
        }

        public void TestFinished(ITestResult result)
        {
            // A fixture whose setup fails does not start its tests, so report the fixture's own result, which has the reason.
            if (result.Test.IsSuite && result.ResultState.Site is not (FailureSite.SetUp or FailureSite.TearDown)) return;
            string outcome = result.ResultState.Status.ToString();
            console.WriteLine($"{outcome,-8} {result.Duration,6:0.00} s  {result.Test.FullName}");
            if (result.ResultState.Status == TestStatus.Failed) console.WriteLine($"         {result.Message}\n{result.StackTrace}");
            Record(new
            {
                @event = "end", name = result.Test.FullName, suite = result.Test.IsSuite, outcome, seconds = result.Duration,
                message = result.Message, stack = result.StackTrace, output = result.Output,
            });
        }

        /// <summary>Prints the progress of a long test, because the lab takes a guest without output for hung.</summary>
        public void TestOutput(TestOutput output) => console.WriteLine($"         {output.Text.TrimEnd()}");

        public void SendMessage(TestMessage message)
        {
        }

        private void Record(object record) => records.WriteLine(JsonSerializer.Serialize(record));
    }
}
