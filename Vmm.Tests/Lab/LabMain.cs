using System.Reflection;
using System.Security;
using System.Text.Json;
using NUnit.Framework.Api;
using NUnit.Framework.Interfaces;
using NUnit.Framework.Internal;

namespace Vmm.Tests.Lab;

/// <summary>
/// Runs this folder's tests without a test host, as the lab does: <c>dotnet Vmm.Tests.dll RECORDS [FILTER]</c>. A line for each test on stdout,
/// a JSON record for each start and end in RECORDS, so that what a crash interrupts is known by name.
/// </summary>
internal static class LabMain
{
    public static int Main(string[] arguments)
    {
        if (LabOtherProcess.Run(arguments) is { } code) return code;
        using var records = new StreamWriter(arguments[0]) { AutoFlush = true };
        // NUnit replaces Console.Out.
        using var console = new StreamWriter(Console.OpenStandardOutput()) { AutoFlush = true };
        var runner = new NUnitTestAssemblyRunner(new DefaultTestAssemblyBuilder());
        runner.Load(Assembly.GetExecutingAssembly(), new Dictionary<string, object>
        {
            [NUnit.FrameworkPackageSettings.LOAD] = new[] { "Vmm.Tests.Lab" },
            // One device and one processor: tests at a time would only wait for each other.
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
            // A fixture that cannot be set up fails its tests without starting them; its own failure says why.
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

        /// <summary>What a long test says of its progress: without a word for long, the guest counts as hung.</summary>
        public void TestOutput(TestOutput output) => console.WriteLine($"         {output.Text.TrimEnd()}");

        public void SendMessage(TestMessage message)
        {
        }

        private void Record(object record) => records.WriteLine(JsonSerializer.Serialize(record));
    }
}
